// The loop: ask for the state, show it, ask again. The server sets the pace; nobody asks while nobody looks.

const PAUSE_MS = 100; // between two questions, beside the server's own pace
const MOST_WAIT_MS = 4000; // between two tries, when there is no answer
const LEGEND = [["one", "of one request"], ["shared", "shared"], ["cached", "cached"], ["free", "free"]];

const lines = new TimeLines(byId("tiles"));
const map = new PoolMap(byId("map"), byId("page-told"));
const requests = new Requests(byId("rows"), map);
const chat = new Chat();
const legend = Object.fromEntries(LEGEND.map(([name, text]) => {
  const item = byId("legend").appendChild(make("li"));
  item.append(make("span", `swatch ${name}`), make("span", "", text));
  const number = item.appendChild(make("b", "", "–"));
  number.id = `count-${name}`;
  return [name, number];
}));

let server = null; // which one answered last: another id is another process
let lastAnswer = null;

function tellStatus(state, text) {
  byId("status").dataset.state = state;
  setText(byId("status"), text);
}

function tell(text, isBad = false) {
  byId("banner").hidden = !text;
  byId("banner").dataset.state = isBad ? "bad" : "note";
  setText(byId("banner"), text);
}

function show({ now, look }) {
  document.body.classList.remove("stale");
  if (server !== null && server !== now.server) {
    lines.restart();
    tell(`The server was restarted and answered again at ${new Date().toLocaleTimeString()}. Its counters began anew.`);
    setTimeout(() => { if (!document.body.classList.contains("stale")) tell(""); }, 20000);
  } else if (server === null || byId("banner").dataset.state === "bad") tell("");
  server = now.server;
  lastAnswer = performance.now();
  byId("forget").hidden = sessionStorage.getItem(KEY_NAME) === null;
  setText(byId("model"), `${now.model} · ${now.version}`);
  document.title = `${now.model} · jaxpaged`;
  if (now.problem) tell(now.problem, true);
  if (now.problem) tellStatus("warn", "not healthy");
  else if (!now.is_ready) tellStatus("warn", "draining");
  else tellStatus("live", "live");
  if (look === null || (look.map.since ?? map.name) !== map.name) return; // of no use to what is here
  map.update(look);
  requests.update(look);
  lines.add(look);
  const counts = map.counts();
  for (const [name, node] of Object.entries(legend)) setText(node, grouped.format(counts[name]));
  const { num_pages: pages, page_size: size } = look.pool;
  setText(byId("pool-size"), `${grouped.format(pages)} of ${count(size, "token")} each`);
  byId("map").setAttribute("aria-label", `Map of ${count(pages, "page")}: ${LEGEND.map(([name, text]) => `${counts[name]} ${text}`).join(", ")}. Arrow keys go from page to page.`);
}

function tellLost() {
  document.body.classList.add("stale");
  tellStatus("bad", "no answer");
  tell(lastAnswer === null ? "The server does not answer. Trying again."
    : `The server has not answered for ${shortTime((performance.now() - lastAnswer) / 1000)}. What is shown is the last that it said. Trying again.`, true);
}

// The key, from whoever sits here.
function askKey(problem) {
  const dialog = byId("key-dialog");
  tellStatus("warn", "key needed");
  setText(byId("key-told"), problem);
  byId("key").value = "";
  if (!dialog.open) dialog.showModal();
  byId("key").focus();
  return new Promise((given) => {
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const key = byId("key").value.trim();
      // What is no header cannot be a key.
      if (!/^[\x21-\x7e]+$/.test(key)) {
        setText(byId("key-told"), "A key has no spaces and no letters beyond ASCII.");
        given(askKey(byId("key-told").textContent));
        return;
      }
      sessionStorage.setItem(KEY_NAME, key);
      given();
    }, { once: true });
  });
}

byId("key-dialog").addEventListener("cancel", (event) => event.preventDefault()); // there is nothing behind it
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY_NAME);
  location.reload();
});

async function turn() {
  if (document.hidden) {
    tellStatus("waiting", "paused");
    await new Promise((seen) => document.addEventListener("visibilitychange", seen, { once: true }));
  }
  const response = await ask(`ui/state?since=${encodeURIComponent(map.name)}`, { signal: AbortSignal.timeout(15000) });
  const state = await response.json();
  if (byId("key-dialog").open) byId("key-dialog").close();
  show(state);
}

async function run() {
  let wait = PAUSE_MS;
  for (;;) {
    try {
      await turn();
      wait = PAUSE_MS;
    } catch (error) {
      if (error instanceof Refused && error.status === 401) {
        const had = sessionStorage.getItem(KEY_NAME) !== null;
        sessionStorage.removeItem(KEY_NAME);
        await askKey(had ? "The server does not know this key." : "");
        continue;
      }
      if (!(error instanceof Refused) && !["TypeError", "TimeoutError", "SyntaxError", "AbortError"].includes(error.name)) throw error;
      tellLost();
      wait = Math.min(MOST_WAIT_MS, 2 * wait);
    }
    await sleep(wait);
  }
}

run();
