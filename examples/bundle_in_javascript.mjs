// A picture from a bundle in JavaScript, with nothing but its graph and its bundle.json: what a program in
// another language has to do. In a folder with `npm install onnxruntime-web` (or onnxruntime-node):
//
//     effformer export runs/digits -o bundle
//     node bundle_in_javascript.mjs bundle 3 digit.f32
//
// prints the picture and writes its C x H x W numbers as float32.

import { readFileSync, writeFileSync } from "node:fs";
import { argv, env } from "node:process";

const [folder, label = "0", out = "digit.f32"] = argv.slice(2);
const ort = await import(env.RUNTIME ?? "onnxruntime-web");
const facts = JSON.parse(readFileSync(`${folder}/bundle.json`, "utf-8"));
const session = await ort.InferenceSession.create(readFileSync(`${folder}/${facts.graphs.velocity}`));
const [channels, height, width] = facts.shape;
const size = channels * height * width;
const { steps, guidance } = facts.sampler;

// the velocity of two samples in one call: of the class, and of "no label"
const guided = guidance !== 1;
const labels = guided ? [label, facts.null_label] : [label];
async function velocity(x, t) {
  const feeds = {
    x: new ort.Tensor("float32", Float32Array.from(labels.flatMap(() => [...x])), [labels.length, ...facts.shape]),
    t: new ort.Tensor("float32", new Float32Array(labels.length).fill(t), [labels.length]),
    y: new ort.Tensor("int64", BigInt64Array.from(labels, BigInt), [labels.length]),
  };
  const v = Object.values(await session.run(feeds, [session.outputNames[0]]))[0].data;
  if (!guided) return v;
  return v.slice(0, size).map((cond, i) => v[size + i] + guidance * (cond - v[size + i]));
}

// standard normal noise of seed 0, as the page of `--target web` draws it: mulberry32, Box-Muller
let state = 0;
function uniform() {
  state = (state + 0x6d2b79f5) >>> 0;
  let z = Math.imul(state ^ (state >>> 15), state | 1);
  z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
  return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
}
let x = new Float32Array(size);
for (let i = 0; i < size; i += 2) {
  const [radius, angle] = [Math.sqrt(-2 * Math.log(1 - uniform())), 2 * Math.PI * uniform()];
  x[i] = radius * Math.cos(angle);
  if (i + 1 < size) x[i + 1] = radius * Math.sin(angle);
}

// from noise at t = 0 to data at t = 1, by Euler's steps
for (let i = 0; i < steps; i++) {
  const v = await velocity(x, i / steps);
  x = x.map((value, n) => value + v[n] / steps);
}
writeFileSync(out, x);

const [black, white] = facts.value_range;
for (let row = 0; row < height; row++) {
  const line = [...x.subarray(row * width, (row + 1) * width)];
  const shades = line.map((value) => Math.min(Math.max((value - black) / (white - black), 0), 1));
  console.log(shades.map((shade) => " .:-=+*#%@"[Math.round(9 * shade)].repeat(2)).join(""));
}
