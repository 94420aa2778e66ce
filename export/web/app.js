// The page around a bundle: says whether it computes here what it should, and draws.

import { SAMPLERS } from "./bundle.js";
import { png, rgba } from "./picture.js";

const at = (id) => document.getElementById(id);
const worker = globalThis.WebAssembly ? new Worker(new URL("worker.js", import.meta.url), { type: "module" }) : null;
let facts = null;
let classes = [];
let shown = null; // the picture on the canvas, and the words that go with it
let asked = null; // the request that is worked on

// i32.const 0, i8x16.splat, drop: a function that needs 128-bit vectors
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 9, 1, 7, 0, 65, 0, 253, 15, 26, 11];

function say(kind, words) {
  at("status").className = kind;
  at("status").textContent = words;
}

function begin() {
  if (!worker) return say("bad", "This browser has no WebAssembly, in which the model runs; use a current one, or allow it.");
  if (!WebAssembly.validate(new Uint8Array(SIMD))) {
    return say("bad", "This browser has no WebAssembly SIMD, which onnxruntime-web needs; use a current one.");
  }
  say("busy", "Loading the model and the runtime, and comparing them with the recorded numbers.");
  worker.postMessage({ kind: "open" });
}

function opened({ facts: found, classes: names, test, seconds, threads, isolated }) {
  [facts, classes] = [found, names];
  const error = Math.max(test.velocity, test.sample ?? 0);
  const [is, may] = [error.toExponential(1), test.tolerance.toExponential(0)];
  say("good", `Verified: what this browser computes differs by ${is} from the recorded numbers (allowed ${may}).`);
  document.title = `${facts.model} in this browser`;
  at("name").textContent = facts.model;
  prepare();
  const alone = isolated ? "" : " (the server does not isolate the page, as more would need)";
  list({
    Backend: `WebAssembly with SIMD, ${threads} thread${threads > 1 ? "s" : alone}`,
    "Error, velocity": test.velocity.toExponential(1),
    "Error, sample": test.sample === null ? "none was recorded" : test.sample.toExponential(1),
    "Ready after": `${seconds.toFixed(2)} s`,
    Model: `${facts.model}, ${(bytes("velocity.onnx") / 1e6).toFixed(2)} MB, samples ${facts.shape.join(" x ")}`,
    "One evaluation": facts.macs ? `${quantity(facts.macs.velocity)} multiply-adds` : "not counted",
    Runtime: `${facts.web.runtime.name} ${facts.web.runtime.version} (${facts.web.runtime.license})`,
    Written: `by effformer ${facts.effformer}`,
  });
  at("work").hidden = false;
  draw();
}

const bytes = (name) => Object.entries(facts.files).filter(([file]) => file.startsWith(name)).reduce((sum, [, f]) => sum + f.bytes, 0);

function list(rows) {
  at("facts").hidden = false;
  for (const [name, value] of Object.entries(rows)) {
    const row = at("facts").tBodies[0].insertRow();
    row.append(Object.assign(document.createElement("th"), { textContent: name, scope: "row" }));
    row.insertCell().textContent = value;
  }
}

/** Fill the form with what the bundle knows, its own settings first. */
function prepare() {
  const own = facts.sampler;
  const options = classes.map((name, id) => new Option(name, id));
  if (classes.length > 1 && classes.length <= 16) options.unshift(new Option(`each of the ${classes.length}`, "each"));
  at("label").replaceChildren(...options);
  at("label").value = "0";
  at("sampler").replaceChildren(...Object.keys(SAMPLERS).map((name) => new Option(name)));
  at("sampler").value = own.name;
  range("steps", 1, Math.max(50, own.steps), own.steps);
  range("guidance", Math.min(0, own.guidance), Math.max(10, own.guidance), own.guidance);
  toggle(".guided", facts.null_label !== null);
  toggle(".cached", Boolean(own.cache));
  if (own.cache) at("schedule").textContent = `blocks run once in ${own.cache.every} evaluations, after the first ${own.cache.warm}`;
  const channels = facts.shape[0];
  at("note").hidden = Boolean(facts.graphs.decoder) || channels === 1 || channels === 3;
  if (!at("note").hidden) at("note").textContent = `Samples have ${channels} channels; the picture shows the first ${channels < 3 ? "one" : "three"}.`;
}

const toggle = (which, on) => document.querySelectorAll(which).forEach((element) => (element.hidden = !on));

function range(id, min, max, value) {
  Object.assign(at(id), { min, max });
  at(id).value = value;
  const tell = () => (document.querySelector(`output[for=${id}]`).value = at(id).value);
  at(id).oninput = tell;
  tell();
}

function draw() {
  if (asked || !at("request").reportValidity()) return;
  const each = at("label").value === "each";
  const labels = each
    ? classes.map((_, id) => id)
    : Array(Number(at("count").value)).fill(Number(at("label").value));
  asked = {
    labels, seed: Number(at("seed").value), steps: Number(at("steps").value), sampler: at("sampler").value,
    guidance: facts.null_label === null ? 1 : Number(at("guidance").value), cache: at("cache").checked,
  };
  working(true);
  worker.postMessage({ kind: "draw", request: asked });
}

function working(on) {
  at("draw").disabled = on;
  at("stop").disabled = !on;
  at("save").disabled = on || !shown;
  if (on) measure({ evaluations: 0, macs: 0, seconds: 0 });
}

/** The meter: work that is done, of the evaluations that the request takes. */
function measure({ evaluations, macs, seconds }) {
  const all = asked.steps * SAMPLERS[asked.sampler][1].length;
  at("progress").value = evaluations / all;
  const work = facts.macs ? `${quantity(macs)} multiply-adds, ` : "";
  at("meter").textContent = `${work}${evaluations} of ${all} evaluations, ${seconds.toFixed(2)} s`;
}

function quantity(number) {
  const [unit, name] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([u]) => number >= u) ?? [1, ""];
  return name ? `${(number / unit).toPrecision(3)} ${name}` : String(number);
}

function drawn({ picture, work }) {
  const { labels, seed, steps, guidance, sampler, cache } = asked;
  const named = [...new Set(labels)].map((id) => classes[id]).join(", ");
  const words = {
    Software: "effformer:samples", Model: facts.model, Label: labels.join(","), Class: named, Steps: steps,
    Guidance: guidance, Seed: seed, Sampler: sampler, Noise: "mulberry32, Box-Muller",
    ...(facts.sampler.cache ? { Cache: cache ? JSON.stringify(facts.sampler.cache) : "none" } : {}),
    ...(facts.macs ? { "Multiply-adds": work.macs } : {}), Checksum: facts.files[facts.graphs.velocity].sha256,
  };
  shown = { picture, words };
  const { width, height } = picture;
  Object.assign(at("canvas"), { width, height });
  at("canvas").getContext("2d").putImageData(new ImageData(rgba(picture), width, height), 0, 0);
  at("canvas").setAttribute("aria-label", `${labels.length} drawn: class ${named}, seed ${seed}`);
  measure(work);
  asked = null;
  working(false);
}

async function save() {
  const { words, picture } = shown;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([await png(picture, words)], { type: "image/png" }));
  link.download = `${words.Model}-${words.Label.replaceAll(",", "-").slice(0, 40)}-seed-${words.Seed}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function failed({ of, why }) {
  if (of === "open") return say("bad", `This page cannot draw: ${why}.`);
  asked = null;
  working(false);
  at("meter").textContent = why === "stopped" ? "stopped" : `Not drawn: ${why}.`;
}

at("request").onsubmit = (event) => {
  event.preventDefault();
  draw();
};
at("label").onchange = () => (at("count").disabled = at("label").value === "each");
at("dice").onclick = () => {
  at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  draw();
};
at("stop").onclick = () => worker.postMessage({ kind: "stop" });
at("save").onclick = save;
if (worker) {
  const heard = { open: opened, draw: drawn, work: ({ work }) => measure(work), error: failed };
  worker.onmessage = ({ data }) => heard[data.kind](data);
  worker.onerror = (event) => say("bad", `worker.js cannot be loaded or failed (${event.message ?? "not found"}); copy the whole folder to the server.`);
}
if (at("status").className !== "bad") begin(); // else index.html has said why not
