// Numbers as time lines of the last two minutes. What is not known is a gap, not a zero.

const SPAN_S = 120;
const WINDOW_S = 1; // over which a rate is taken
const RATIO_WINDOW_S = 30; // over which a share is taken: it has to have something to divide by
const BREAK_S = 6; // between two looks, so that nothing is drawn between them

class Tile {
  constructor(parent, title, unit) {
    const tile = make("div", "tile");
    this.value = make("p", "value");
    this.number = this.value.appendChild(make("span", "", "–"));
    this.unit = this.value.appendChild(make("small", "", unit));
    const head = tile.appendChild(make("div", "head"));
    head.append(make("h2", "", title));
    this.note = head.appendChild(make("p", "note clip"));
    const picture = document.createElementNS(SVG, "svg");
    picture.setAttribute("viewBox", "0 0 100 100");
    picture.setAttribute("preserveAspectRatio", "none");
    picture.setAttribute("aria-hidden", "true");
    [this.area, this.line] = ["area", "line"].map((name) => {
      const path = picture.appendChild(document.createElementNS(SVG, "path"));
      path.setAttribute("class", name);
      return path;
    });
    tile.append(this.value, picture);
    parent.append(tile);
    this.points = []; // [seconds, number or null]
    this.most = 0;
  }

  add(at, number, shown, note) {
    this.points.push([at, number]);
    while (this.points.length && this.points[0][0] < at - SPAN_S) this.points.shift();
    setText(this.number, shown);
    this.unit.hidden = number === null;
    setText(this.note, note);
    this.note.title = note;
    this.draw(at);
  }

  draw(now) {
    const top = Math.max(this.most, ...this.points.map((point) => point[1] ?? 0)) || 1;
    const runs = [];
    let before = -Infinity;
    for (const [at, number] of this.points) {
      if (number === null) { before = -Infinity; continue; }
      if (at - before > BREAK_S) runs.push([]);
      runs.at(-1).push([100 * (1 - (now - at) / SPAN_S), 96 - 90 * number / top]);
      before = at;
    }
    const through = (run) => run.map(([x, y]) => `${x.toFixed(2)} ${y.toFixed(1)}`).join("L");
    this.line.setAttribute("d", runs.map((run) => `M${through(run)}`).join(""));
    this.area.setAttribute("d", runs.map((run) => `M${run[0][0].toFixed(2)} 100L${through(run)}L${run.at(-1)[0].toFixed(2)} 100Z`).join(""));
  }
}

class TimeLines {
  constructor(parent) {
    const tile = (title, unit) => new Tile(parent, title, unit);
    this.tokens = tile("Generated", "tokens/s");
    this.running = tile("Running", "");
    this.queue = tile("Waiting", "");
    this.pages = tile("Pages in use", "%");
    this.hits = tile("Cache hits", "%");
    this.drafts = tile("Acceptance", "%");
    this.pages.most = this.hits.most = this.drafts.most = 100;
    this.looks = []; // [seconds, counts]
  }

  // The server began anew: what it counted before is no part of what it counts now.
  restart() {
    this.looks = [];
  }

  add(look) {
    const { at_s: at, counts, limits } = look;
    // Its clock may begin anew with it; ours goes on.
    const now = performance.now() / 1000;
    this.looks.push([at, counts]);
    while (this.looks.length && this.looks[0][0] < at - RATIO_WINDOW_S) this.looks.shift();
    const tokens = this.rate(at, "generation_tokens");
    this.tokens.add(now, tokens, tokens === null ? "–" : (tokens < 10 ? oneDigit : wholeNumbers).format(tokens),
      `${compact.format(counts.generation_tokens)} so far`);
    this.running.add(now, counts.num_requests_running, grouped.format(counts.num_requests_running), `room for ${grouped.format(limits.max_num_seqs)}`);
    this.queue.add(now, counts.num_requests_waiting, grouped.format(counts.num_requests_waiting),
      `${compact.format(counts.num_queued_requests)} / ${compact.format(limits.max_queued_requests)} queued`);
    const used = 100 * counts.kv_cache_usage_perc;
    this.pages.add(now, used, oneDigit.format(used), counts.num_preemptions ? count(counts.num_preemptions, "preemption") : "");
    const hits = this.share(at, "prefix_cache_hits", "prefix_cache_queries");
    this.hits.add(now, hits, hits === null ? "–" : oneDigit.format(hits),
      counts.prefix_cache_queries ? `${compact.format(counts.prefix_cache_hits)} tokens` : "no prompt yet");
    const isOn = counts.spec_decode_num_draft_tokens !== undefined;
    const drafts = isOn ? this.share(at, "spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens") : null;
    this.drafts.add(now, drafts, isOn ? (drafts === null ? "–" : oneDigit.format(drafts)) : "off",
      isOn ? `${compact.format(counts.spec_decode_num_accepted_tokens)} drafts` : "no speculation");
  }

  rate(at, name) {
    const first = this.looks.findLast(([then]) => then <= at - WINDOW_S);
    return first === undefined ? null : Math.max(0, (this.looks.at(-1)[1][name] - first[1][name]) / (at - first[0]));
  }

  share(at, part, all) {
    const [first, last] = [this.looks[0][1], this.looks.at(-1)[1]];
    const many = last[all] - first[all];
    return many > 0 ? Math.min(100, 100 * (last[part] - first[part]) / many) : null;
  }
}

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
