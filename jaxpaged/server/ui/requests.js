// The requests that run and wait, a row each. A row is made once and changed in place.

class Requests {
  constructor(body, map) {
    this.body = body;
    this.map = map;
    this.rows = new Map(); // name -> { row and what of it changes }
    body.addEventListener("pointerover", (event) => this.point(event.target));
    body.addEventListener("pointerleave", () => this.map.show(null));
    body.addEventListener("focusin", (event) => this.point(event.target));
    body.addEventListener("focusout", () => this.map.show(null));
    body.addEventListener("keydown", (event) => {
      const row = event.target.closest("tr");
      const next = { ArrowDown: row?.nextElementSibling, ArrowUp: row?.previousElementSibling,
        Home: body.firstElementChild, End: body.lastElementChild }[event.key];
      if (!next) return;
      event.preventDefault();
      next.focus();
    });
  }

  point(node) {
    const row = node.closest("tr");
    if (row) this.map.show(Number(row.dataset.number));
  }

  update(look) {
    // First those that have left: a row that is moved loses the focus, and none is moved but for a new order.
    const listed = new Set(look.requests.map((line) => line.request));
    for (const [name, { row }] of this.rows) if (!listed.has(name)) this.remove(name, row);
    let before = null;
    for (const line of look.requests) {
      const known = this.rows.get(line.request) ?? this.add(line);
      this.fill(known, line);
      const place = before === null ? this.body.firstElementChild : before.nextElementSibling;
      if (place !== known.row) this.body.insertBefore(known.row, place);
      before = known.row;
    }
    // One stop of the tab key for all of them.
    if (this.body.firstElementChild && !this.body.querySelector('tr[tabindex="0"]')) this.body.firstElementChild.tabIndex = 0;
    byId("no-rows").hidden = this.rows.size > 0;
    const more = look.left_out ? `, ${grouped.format(look.requests.length)} listed` : "";
    const { num_requests_running: running, num_requests_waiting: waiting } = look.counts;
    setText(byId("requests-count"), `${grouped.format(running)} running, ${grouped.format(waiting)} waiting${more}`);
  }

  remove(name, row) {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    const hadFocus = row === document.activeElement;
    row.remove();
    this.rows.delete(name);
    if (hadFocus) next?.focus();
  }

  add(line) {
    const row = make("tr");
    row.tabIndex = -1;
    row.addEventListener("focus", () => {
      for (const other of this.body.querySelectorAll('tr[tabindex="0"]')) other.tabIndex = -1;
      row.tabIndex = 0;
    });
    const cells = ["", "", "", "number wide", "number wide", "number"].map((name) => row.appendChild(make("td", name)));
    const swatch = cells[0].appendChild(make("span", "swatch"));
    cells[0].append(make("span", "", line.request));
    cells[0].title = line.request;
    const progress = cells[2].appendChild(make("div", "progress"));
    const tokens = progress.appendChild(make("span"));
    const bar = progress.appendChild(make("i"));
    const known = { row, cells, swatch, tokens, bar };
    this.rows.set(line.request, known);
    return known;
  }

  fill(known, line) {
    const { row, cells } = known;
    const state = stateOf(line);
    row.dataset.number = line.number;
    row.dataset.state = state;
    known.swatch.style.background = line.pages ? this.map.swatch(line.value) : "";
    setText(cells[1], state);
    setText(known.tokens, `${grouped.format(line.tokens)} / ${grouped.format(line.max_len)}`);
    known.bar.style.setProperty("--done", `${Math.min(100, 100 * line.tokens / line.max_len).toFixed(1)}%`);
    cells[2].title = `${count(line.prompt, "token")} of prompt, ${grouped.format(line.computed)} computed, ends at ${grouped.format(line.max_len)}`;
    setText(cells[3], grouped.format(line.pages));
    setText(cells[4], grouped.format(line.cached_tokens));
    setText(cells[5], shortTime(line.age_s));
  }
}

function stateOf(line) {
  if (line.state === "waiting") return line.preemptions ? "preempted" : "waiting";
  return line.tokens > line.prompt ? "decoding" : "prefill";
}
