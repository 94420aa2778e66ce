// An edge bundle in a browser (or in node): opened, verified and sampled as `run.py` beside it does,
// in the same order of float32 operations.

export const FORMAT = 1;

// Butcher tableaus: rows of the stages after the first, weights of the result, times of the stages.
export const SAMPLERS = {
  euler: [[], [1], []],
  midpoint: [[[1 / 2]], [0, 1], [1 / 2]],
  heun: [[[1]], [1 / 2, 1 / 2], [1]],
  rk4: [[[1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6], [1 / 2, 1 / 2, 1]],
};

const f32 = Math.fround;

/** A bundle or a request that cannot be served; the message is one sentence for the user. */
export class BundleError extends Error {}

export class Bundle {
  /**
   * @param ort onnxruntime-web.
   * @param read async function: name of a file of the bundle -> its bytes (Uint8Array).
   */
  static async open(ort, read) {
    const bundle = new Bundle();
    const facts = parseFacts(await read("bundle.json"));
    const [velocity, light, decoder] = ["velocity", "light", "decoder"].map((g) => facts.graphs[g]);
    Object.assign(bundle, { ort, facts, shape: facts.shape, size: product(facts.shape) });
    bundle.read = (name) => readChecked(read, name, facts.files[name]);
    bundle.graphs = {
      velocity: await bundle.session(velocity, ["t", "x", "y"]),
      light: light ? await bundle.session(light, ["change", "t", "x", "y"]) : null,
      decoder: decoder ? await bundle.session(decoder, ["x"]) : null,
    };
    return bundle;
  }

  /** Names of the classes, or their numbers where nobody gave them names. */
  get classes() {
    const names = this.facts.trained?.classes ?? [];
    return Array.from({ length: this.facts.num_classes }, (_, i) => String(names[i] ?? i));
  }

  /** The velocity at x (Float32Array of B samples) and time t for class ids. */
  async velocity(x, t, labels, run = {}) {
    const count = labels.length;
    const change = run.carried?.next(t) ?? null;
    const feed = {
      x: new this.ort.Tensor("float32", x, [count, ...this.shape]),
      t: new this.ort.Tensor("float32", new Float32Array(count).fill(t), [count]),
      y: new this.ort.Tensor("int64", BigInt64Array.from(labels, BigInt), [count]),
    };
    const graph = change ? "light" : "velocity";
    if (change) feed.change = change;
    const [out, made] = await this.run(graph, feed, run.carried && !change ? 2 : 1);
    if (made) run.carried.learn(t, made);
    if (out.data.length !== x.length) {
      throw new BundleError(`${graph}: the graph gives [${out.dims}] for ${count} samples of [${this.shape}]`);
    }
    await run.told?.(graph, count);
    return out.data;
  }

  /** `v_null + scale (v_cond - v_null)`, both from one evaluation of 2B samples. */
  async guided(x, t, labels, scale, run) {
    if (scale === 1) return this.velocity(x, t, labels, run);
    const twice = new Float32Array(2 * x.length);
    twice.set(x);
    twice.set(x, x.length);
    const null_ = labels.map(() => this.facts.null_label);
    const both = await this.velocity(twice, t, [...labels, ...null_], run);
    const cond = both.subarray(0, x.length);
    const without = both.subarray(x.length);
    const [channels, height, width] = this.shape;
    const guided = (this.facts.sampler.guidance_channels ?? channels) * height * width;
    const strength = f32(scale);
    return cond.map((c, i) =>
      i % this.size < guided ? without[i] + f32(strength * f32(c - without[i])) : c,
    );
  }

  /**
   * Samples (Float32Array of B x C x H x W), one for each label.
   *
   * @param labels class ids.
   * @param noise standard normal numbers to start from.
   * @param options steps, guidance, sampler: the bundle's own where they are not given; cache: false
   *   for none; told: async (graph, samples) after every evaluation.
   */
  async sample(labels, noise, options = {}) {
    const own = this.facts.sampler;
    const { steps = own.steps, guidance = own.guidance, sampler = own.name } = options;
    if (guidance !== 1 && this.facts.null_label === null) {
      throw new BundleError(`guidance ${guidance} needs a null class, which this model has not`);
    }
    const useCache = own.cache && options.cache !== false && this.graphs.light;
    const run = { told: options.told, carried: useCache ? new Carried(this.ort, own.cache) : null };
    const field = (x, t) => this.guided(x, t, labels, guidance, run);
    let x = Float32Array.from(noise);
    for (let i = 0; i < steps; i++) x = await step(field, x, i / steps, 1 / steps, sampler);
    if (!x.every(Number.isFinite)) {
      const how = `${sampler}, ${steps} steps, guidance ${guidance}`;
      throw new BundleError(`samples are not finite (${how}); use more steps`);
    }
    return x;
  }

  /**
   * How far this machine's velocity, and what it draws, lie from what was recorded where the bundle
   * was made: `{velocity, sample, tolerance}`, relative; sample is null where none was recorded.
   */
  async selfTest() {
    const test = this.facts.self_test;
    const [noise, expected] = [await this.recorded(test.noise, test), await this.recorded(test.file, test)];
    const velocity = difference(await this.velocity(noise, test.t, test.labels), expected);
    check("velocity", velocity, test.tolerance);
    const drawn = test.sample;
    if (!drawn) return { velocity, sample: null, tolerance: test.tolerance };
    const start = await this.recorded(drawn.noise, drawn);
    const actual = await this.sample(drawn.labels, start, { steps: drawn.steps });
    const sample = difference(actual, await this.recorded(drawn.file, drawn));
    check("sample", sample, drawn.tolerance);
    return { velocity, sample, tolerance: Math.max(test.tolerance, drawn.tolerance) };
  }

  /** What a picture is made of: `{data, dims}` of samples, through the decoder if there is one. */
  async decoded(samples) {
    const dims = [samples.length / this.size, ...this.shape];
    if (!this.graphs.decoder) return { data: samples, dims };
    const [out] = await this.run("decoder", { x: new this.ort.Tensor("float32", samples, dims) }, 1);
    return { data: out.data, dims: out.dims };
  }

  async session(name, inputs) {
    const external = Object.keys(this.facts.files).filter((file) => file.startsWith(`${name}.`));
    const externalData = [];
    for (const path of external) externalData.push({ path, data: await this.read(path) });
    const data = await this.read(name);
    let session;
    try {
      session = await this.ort.InferenceSession.create(data, { logSeverityLevel: 4, externalData });
    } catch (error) {
      throw new BundleError(`${name}: onnxruntime-web cannot load it (${line(error)})`);
    }
    const found = [...session.inputNames].sort();
    if (found.join() !== inputs.join()) {
      throw new BundleError(`${name}: takes ${found.join(", ")}, expected ${inputs.join(", ")}`);
    }
    return session;
  }

  async run(graph, feed, count) {
    const names = this.graphs[graph].outputNames.slice(0, count);
    try {
      const out = await this.graphs[graph].run(feed, names);
      return names.map((name) => out[name]);
    } catch (error) {
      const refused = /Name:'refused: ([^']+?)( #[0-9]+)?(_quant)?'/.exec(String(error));
      throw new BundleError(refused ? refused[1] : `onnxruntime-web cannot run ${graph} (${line(error)})`);
    }
  }

  async recorded(file, test) {
    return readArray(await this.read(file), file, [test.labels.length, ...this.shape]);
  }
}

/**
 * What the blocks of a network add, carried on from the evaluations that computed it by the
 * polynomial through the last of them, in time.
 */
export class Carried {
  constructor(ort, { every = 3, warm = 3, order = 2 } = {}) {
    Object.assign(this, { ort, every, warm, order, evaluations: 0, points: [] });
  }

  /** The change at the time of the next evaluation; null if it is computed. */
  next(t) {
    const k = this.evaluations++;
    if (k < this.warm || (k - this.warm) % this.every === 0 || !this.points.length) return null;
    const total = new Float32Array(this.points[0].change.data.length);
    this.points.forEach(({ t: here, change }, j) => {
      let weight = 1;
      this.points.forEach(({ t: there }, i) => (weight *= i === j ? 1 : (t - there) / (here - there)));
      const rounded = f32(weight);
      change.data.forEach((value, n) => (total[n] += f32(rounded * value)));
    });
    return new this.ort.Tensor("float32", total, this.points[0].change.dims);
  }

  /** Take what an evaluation computed. */
  learn(t, change) {
    const kept = this.points.filter((point) => point.t !== t);
    this.points = [...kept, { t, change }].slice(-this.order - 1);
  }
}

/** One step of a sampler: x at time t + dt. */
export async function step(field, x, t, dt, name) {
  const [rows, weights, times] = SAMPLERS[name];
  const stages = [await field(x, t)];
  for (let i = 0; i < rows.length; i++) {
    stages.push(await field(combine(x, stages, rows[i], dt), t + times[i] * dt));
  }
  return combine(x, stages, weights, dt);
}

/**
 * Standard normal numbers of a seed in 0..2^32 - 1: uniform ones of mulberry32 (32-bit state, a
 * Weyl sequence and a mixer), two at a time through the Box-Muller transform.
 */
export function normal(seed, count) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  };
  const out = new Float32Array(count);
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform()));
    const angle = 2 * Math.PI * uniform();
    out[i] = radius * Math.cos(angle);
    if (i + 1 < count) out[i + 1] = radius * Math.sin(angle);
  }
  return out;
}

/** The numbers of an .npy file of little-endian float32 in C order. */
export function readArray(bytes, name, shape) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const wide = bytes[6] > 1;
  const start = wide ? 12 : 10;
  const length = wide ? view.getUint32(8, true) : view.getUint16(8, true);
  const header = new TextDecoder("latin1").decode(bytes.subarray(start, start + length));
  const dims = (/'shape': \(([^)]*)\)/.exec(header)?.[1] ?? "").split(",").filter((d) => d.trim()).map(Number);
  const known = header.includes("'<f4'") && header.includes("'fortran_order': False");
  const numbers = new Float32Array(bytes.slice(start + length).buffer);
  if (!known || dims.join() !== shape.join() || numbers.length !== product(shape)) {
    throw new BundleError(`${name}: does not hold float32 numbers of shape [${shape}]`);
  }
  return numbers;
}

function combine(x, stages, weights, dt) {
  let sum = x;
  weights.forEach((weight, i) => {
    if (!weight) return;
    const w = f32(weight * dt);
    sum = sum.map((value, n) => value + f32(w * stages[i][n]));
  });
  return sum;
}

function parseFacts(bytes) {
  let facts;
  try {
    facts = JSON.parse(new TextDecoder().decode(bytes));
  } catch (error) {
    throw new BundleError(`bundle.json: is not readable JSON (${line(error)})`);
  }
  if (!Number.isInteger(facts?.format) || !facts.graphs || !facts.files || !facts.web) {
    throw new BundleError("bundle.json: is not the description of a bundle with a page");
  }
  if (facts.format > FORMAT) {
    const reads = `this page reads up to ${FORMAT}`;
    throw new BundleError(`bundle.json: has format ${facts.format}, ${reads}; copy the whole folder again`);
  }
  return facts;
}

async function readChecked(read, name, record) {
  if (!record) throw new BundleError(`${name}: is not one of the files of the bundle`);
  const bytes = await read(name);
  // browsers hash on pages from https or localhost alone
  const hash = globalThis.crypto?.subtle && new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const digest = hash && Array.from(hash, (b) => b.toString(16).padStart(2, "0")).join("");
  if (bytes.length !== record.bytes || (digest && digest !== record.sha256)) {
    throw new BundleError(`${name}: is damaged (its checksum differs); copy the folder again`);
  }
  return bytes;
}

function difference(actual, expected) {
  const largest = (numbers) => numbers.reduce((most, n) => Math.max(most, Math.abs(n)), 0);
  return largest(actual.map((a, i) => a - expected[i])) / Math.max(largest(expected), 1e-12);
}

function check(what, error, tolerance) {
  if (error <= tolerance) return;
  const [found, allowed] = [error.toExponential(1), tolerance.toExponential(0)];
  throw new BundleError(
    `this browser's ${what} differs by ${found} from the recorded one (allowed ${allowed})`,
  );
}

const product = (shape) => shape.reduce((a, b) => a * b, 1);
const line = (error) => String(error?.message ?? error).split("\n")[0].slice(0, 300);
