// Loads, verifies and samples beside the page, so that the page stays awake.

import { Bundle, BundleError, normal } from "./bundle.js";
import { grid, pixels } from "./picture.js";

let bundle = null;
let stopped = false;

async function read(name) {
  let answer;
  try {
    answer = await fetch(new URL(name, import.meta.url), { cache: "no-cache" });
  } catch (error) {
    throw new BundleError(`${name} cannot be fetched (${error.message}); is the server still running?`);
  }
  if (!answer.ok) {
    throw new BundleError(`${name} cannot be fetched (the server answers ${answer.status}); copy the whole folder to it`);
  }
  return new Uint8Array(await answer.arrayBuffer());
}

async function open() {
  const started = performance.now();
  // the two large files at once; what is wrong with the graph is said when it is opened
  const [ort, runtime] = await Promise.all([load("ort.wasm.bundle.min.mjs"), read("ort-wasm-simd-threaded.wasm")]);
  ort.env.wasm.wasmBinary = runtime;
  bundle = await Bundle.open(ort, read);
  const test = await bundle.selfTest();
  ort.env.wasm.wasmBinary = undefined;
  return {
    facts: bundle.facts, classes: bundle.classes, test, seconds: (performance.now() - started) / 1000,
    threads: ort.env.wasm.numThreads || 1, isolated: Boolean(globalThis.crossOriginIsolated),
  };
}

async function load(name) {
  try {
    return await import(`./${name}`);
  } catch (error) {
    throw new BundleError(`${name} cannot be loaded (${error.message}); copy the whole folder to the server`);
  }
}

async function draw({ labels, seed, ...options }) {
  stopped = false;
  const started = performance.now();
  const work = { evaluations: 0, macs: 0, seconds: 0 };
  const told = async (graph, count) => {
    work.evaluations += 1;
    work.macs += count * (bundle.facts.macs?.[graph] ?? 0);
    work.seconds = (performance.now() - started) / 1000;
    postMessage({ kind: "work", work });
    await turn(); // in which a request to stop arrives
    if (stopped) throw new BundleError("stopped");
  };
  const noise = normal(seed, labels.length * bundle.size);
  const samples = await bundle.sample(labels, noise, { ...options, told });
  const decoded = await bundle.decoded(samples);
  if (bundle.graphs.decoder) work.macs += labels.length * (bundle.facts.macs?.decoder ?? 0);
  work.seconds = (performance.now() - started) / 1000;
  return { picture: grid(pixels(decoded, bundle.facts.value_range)), work };
}

/** Let waiting messages in; a timer would wait four milliseconds. */
function turn() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resume) => {
    port1.onmessage = () => resume(port1.close());
    port2.postMessage(null);
  });
}

onmessage = async ({ data }) => {
  if (data.kind === "stop") {
    stopped = true;
    return;
  }
  try {
    const answer = data.kind === "open" ? await open() : await draw(data.request);
    postMessage({ kind: data.kind, ...answer });
  } catch (error) {
    const why = error instanceof BundleError ? error.message : `it failed (${error?.message ?? error})`;
    postMessage({ kind: "error", of: data.kind, why });
  }
};
