// The map of the pool on a canvas: one cell for each page, a colour for each request, whatever the number of pages.

const [FREE, CACHED, SHARED, FIRST_REQUEST, FIRST_GROUP] = [0, 1, 2, 3, 32768]; // as in page_map.py
const MAX_CELL = 16; // of CSS pixels
const MAX_HEIGHT = 0.4; // of the window
const HINT = "Point at a page to see who owns it.";

class PoolMap {
  constructor(canvas, told) {
    this.canvas = canvas;
    this.told = told;
    this.name = "";
    this.values = new Uint16Array(0);
    this.groups = new Map(); // value -> numbers of requests
    this.byValue = new Map(); // value -> requests
    this.byNumber = new Map();
    this.small = document.createElement("canvas"); // a pixel for each page
    this.cursor = -1;
    this.picked = null; // number of the request whose pages stand out
    this.isDirty = false;
    this.readColours();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.readColours(); this.redraw(); });
    new ResizeObserver(() => this.redraw()).observe(canvas);
    canvas.addEventListener("pointermove", (event) => this.goTo(this.pageAt(event)));
    canvas.addEventListener("pointerdown", (event) => { this.goTo(this.pageAt(event)); this.pick(); });
    canvas.addEventListener("pointerleave", () => { if (document.activeElement !== canvas) this.goTo(-1); });
    canvas.addEventListener("blur", () => this.goTo(-1));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  // --- what is known ---

  update(look) {
    const map = look.map;
    if (map.whole !== undefined) {
      const bytes = Uint8Array.from(atob(map.whole), (letter) => letter.charCodeAt(0));
      this.values = Uint16Array.from({ length: map.num_pages }, (_, page) => bytes[2 * page] | (bytes[2 * page + 1] << 8));
    } else {
      for (let at = 0; at < map.changes.length; at += 3) {
        this.values.fill(map.changes[at + 2], map.changes[at], map.changes[at] + map.changes[at + 1]);
      }
    }
    this.name = map.name;
    this.groups = new Map(map.groups);
    this.byValue.clear();
    this.byNumber.clear();
    for (const line of look.requests) {
      if (line.state === "running") this.byValue.set(line.value, [...(this.byValue.get(line.value) ?? []), line]);
      this.byNumber.set(line.number, line);
    }
    this.redraw();
    this.tell();
  }

  counts() {
    const found = { free: 0, cached: 0, shared: 0, one: 0 };
    for (const value of this.values) {
      if (value === FREE) found.free++;
      else if (value === CACHED) found.cached++;
      else if (value === SHARED || value >= FIRST_GROUP) found.shared++;
      else found.one++;
    }
    return found;
  }

  // --- colours ---

  readColours() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    this.colours = new Uint32Array(65536); // by value; 0 is not known yet
    this.colours[FREE] = packed(of("--free"));
    this.colours[CACHED] = packed(of("--cached"));
    this.shared = packed(of("--shared"));
    this.ground = of("--panel");
    this.frame = of("--ink");
    this.tone = [parseFloat(of("--many-light")), parseFloat(of("--many-chroma"))];
  }

  colour(value) {
    if (!this.colours[value]) {
      this.colours[value] = value >= FIRST_GROUP || value === SHARED ? this.shared : ofHue(hueOf(value), ...this.tone);
    }
    return this.colours[value];
  }

  swatch(value) {
    const colour = this.colour(value);
    return `rgb(${colour & 255} ${(colour >> 8) & 255} ${(colour >> 16) & 255})`;
  }

  // --- drawing ---

  redraw() {
    if (this.isDirty) return;
    this.isDirty = true;
    requestAnimationFrame(() => { this.isDirty = false; this.draw(); });
  }

  place() {
    const scale = devicePixelRatio || 1;
    const width = Math.max(1, Math.floor(this.canvas.clientWidth * scale));
    const most = Math.max(160, innerHeight * MAX_HEIGHT) * scale;
    let cell = Math.max(1, Math.floor(MAX_CELL * scale));
    const rowsOf = (size) => Math.ceil(this.values.length / Math.max(1, Math.floor(width / size)));
    while (cell > 1 && rowsOf(cell) * cell > most) cell--;
    this.cell = cell;
    this.columns = Math.max(1, Math.floor(width / cell));
    this.rows = Math.max(1, rowsOf(cell));
    this.scale = scale;
    // Cells that are large enough share what is left over, and are a pixel wider here and there.
    this.cellWidth = cell >= 4 && this.rows > 1 ? width / this.columns : cell;
    // Those that are tiny may be higher than wide.
    this.cellHeight = cell >= 4 ? cell : Math.max(cell, Math.min(2 * cell, Math.floor(most / this.rows)));
    const height = this.rows * this.cellHeight;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      [this.canvas.width, this.canvas.height] = [width, height];
      this.canvas.style.height = `${height / scale}px`;
    }
  }

  draw() {
    this.place();
    const { columns, rows, cell, cellWidth, cellHeight, values, canvas } = this;
    if (this.small.width !== columns || this.small.height !== rows) [this.small.width, this.small.height] = [columns, rows];
    const context = canvas.getContext("2d");
    context.fillStyle = this.ground;
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (!values.length) return;
    const pixels = new ImageData(columns, rows);
    const words = new Uint32Array(pixels.data.buffer);
    const outstanding = this.picked === null ? null : this.valuesOf(this.picked);
    for (let page = 0; page < values.length; page++) {
      const colour = this.colour(values[page]);
      words[page] = outstanding === null || outstanding.has(values[page]) ? colour : (colour & 0xffffff) | 0x38000000;
    }
    this.small.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.small, 0, 0, columns * cellWidth, rows * cellHeight);
    if (cell >= 4) {
      const gap = cell >= 8 ? Math.max(1, Math.round(this.scale)) : 1;
      for (let column = 1; column < columns; column++) context.fillRect(Math.round(column * cellWidth) - gap, 0, gap, canvas.height);
      for (let row = 1; row < rows; row++) context.fillRect(0, row * cell - gap, canvas.width, gap);
    }
    if (this.cursor >= 0) {
      const size = Math.max(cell, 5 * this.scale);
      const left = (this.cursor % columns) * cellWidth + (cellWidth - size) / 2;
      const top = Math.floor(this.cursor / columns) * cellHeight + (cellHeight - size) / 2;
      context.strokeStyle = this.frame;
      context.lineWidth = Math.max(1, Math.round(1.5 * this.scale));
      context.strokeRect(left, top, size, size);
    }
  }

  // --- one page ---

  valuesOf(number) {
    const found = new Set([FIRST_REQUEST + number % (FIRST_GROUP - FIRST_REQUEST)]);
    for (const [value, numbers] of this.groups) if (numbers.includes(number)) found.add(value);
    return found;
  }

  pageAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) * this.scale / this.cellWidth);
    const row = Math.floor((event.clientY - box.top) * this.scale / this.cellHeight);
    const page = row * this.columns + column;
    return column >= 0 && column < this.columns && page < this.values.length ? page : -1;
  }

  goTo(page) {
    if (page === this.cursor) return;
    this.cursor = page;
    this.tell();
    this.redraw();
  }

  onKey(event) {
    const last = this.values.length - 1;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns };
    if (event.key === "Home") this.goTo(0);
    else if (event.key === "End") this.goTo(last);
    else if (event.key in steps) this.goTo(Math.min(last, Math.max(0, Math.max(0, this.cursor) + steps[event.key])));
    else if (event.key === "Enter" || event.key === " ") this.pick();
    else if (event.key === "Escape") this.show(null);
    else return;
    event.preventDefault();
  }

  pick() {
    const value = this.values[this.cursor];
    const number = this.byValue.get(value)?.[0].number ?? this.groups.get(value)?.[0] ?? null;
    this.show(number === this.picked ? null : number);
  }

  show(number) {
    if (this.picked === number) return;
    this.picked = number;
    this.redraw();
  }

  tell() {
    setText(this.told, this.cursor < 0 || this.cursor >= this.values.length
      ? HINT
      : `Page ${grouped.format(this.cursor + 1)}: ${this.ownersOf(this.values[this.cursor])}`);
  }

  ownersOf(value) {
    if (value === FREE) return "free";
    if (value === CACHED) return "cached; nobody owns it, it is kept for what it holds";
    if (value === SHARED) return "shared";
    const numbers = this.groups.get(value);
    if (numbers === undefined) {
      const lines = this.byValue.get(value);
      return `owned by ${lines === undefined ? "a request that is not listed" : lines.map((line) => line.request).join(", ")}`;
    }
    const names = numbers.slice(0, 6).map((number) => this.byNumber.get(number)?.request ?? `number ${number}`);
    const more = numbers.length > 6 ? ` and ${numbers.length - 6} more` : "";
    return `shared by ${numbers.length === 1 ? "outputs of " : `${numbers.length} requests: `}${names.join(", ")}${more}`;
  }
}

// Neighbours in time differ most: the golden angle, in degrees.
function hueOf(value) {
  return (value * 137.508) % 360;
}

// Oklch to sRGB, so that no hue is brighter than another: Ottosson 2020, "A perceptual color space for image processing".
function ofHue(hue, light, chroma) {
  const [a, b] = [chroma * Math.cos(hue * Math.PI / 180), chroma * Math.sin(hue * Math.PI / 180)];
  const l = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (light - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const byte = (part) => Math.round(255 * Math.min(1, Math.max(0, part <= 0.0031308 ? 12.92 * part : 1.055 * part ** (1 / 2.4) - 0.055)));
  return word(
    byte(4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s),
    byte(-1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s),
    byte(-0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s),
  );
}

function packed(colour) {
  return word(...colour.match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16)));
}

// A pixel as a canvas keeps it on a machine with the low byte first, as all have that run a browser today.
function word(red, green, blue) {
  return (0xff000000 | (blue << 16) | (green << 8) | red) >>> 0;
}
