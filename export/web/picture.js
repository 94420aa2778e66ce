// Pictures of samples: pixels, one grid of them, and a PNG file that says how it was drawn. The grid
// and its pixels are those of `pictures.py`.

/**
 * Bytes (B x H x W x c) of samples (B x C x H x W) whose black and white are `low` and `high`;
 * c = 1 for one or two channels (the first), else 3 (the first three).
 */
export function pixels({ data, dims }, [low, high]) {
  const [count, channels, height, width] = dims;
  const colours = channels < 3 ? 1 : 3;
  const area = height * width;
  const [black, range] = [Math.fround(low), Math.fround(high - low)];
  const out = new Uint8Array(count * area * colours);
  let n = 0;
  for (let b = 0; b < count; b++) {
    for (let i = 0; i < area; i++) {
      for (let c = 0; c < colours; c++) {
        const value = Math.fround(Math.fround(data[(b * channels + c) * area + i] - black) / range);
        out[n++] = even(Math.fround(Math.min(Math.max(value, 0), 1) * 255));
      }
    }
  }
  return { data: out, count, height, width, colours };
}

/** Pictures side by side, each at least 64 pixels wide, with a white line of two around them. */
export function grid({ data, count, height, width, colours }) {
  const side = Math.max(1, Math.floor(64 / width));
  const columns = Math.ceil(Math.sqrt(count));
  const rows = Math.ceil(count / columns);
  const [tall, wide] = [height * side + 2, width * side + 2];
  const out = new Uint8Array((rows * tall + 2) * (columns * wide + 2) * colours).fill(255);
  for (let b = 0; b < count; b++) {
    const [top, left] = [2 + Math.floor(b / columns) * tall, 2 + (b % columns) * wide];
    for (let y = 0; y < height * side; y++) {
      for (let x = 0; x < width * side; x++) {
        const from = ((b * height + Math.floor(y / side)) * width + Math.floor(x / side)) * colours;
        const to = ((top + y) * (columns * wide + 2) + left + x) * colours;
        for (let c = 0; c < colours; c++) out[to + c] = data[from + c];
      }
    }
  }
  return { data: out, height: rows * tall + 2, width: columns * wide + 2, colours };
}

/** Red, green, blue and full opacity, as a canvas takes them. */
export function rgba({ data, height, width, colours }) {
  const out = new Uint8ClampedArray(height * width * 4).fill(255);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) out[4 * i + c] = data[i * colours + (colours === 3 ? c : 0)];
  }
  return out;
}

/** A PNG file (Uint8Array) of a grid, with words about it: keyword -> text, in tEXt chunks, or in iTXt
 * chunks where Latin-1 does not suffice. */
export async function png({ data, height, width, colours }, words) {
  const header = new Uint8Array(13);
  new DataView(header.buffer).setUint32(0, width);
  new DataView(header.buffer).setUint32(4, height);
  header.set([8, colours === 3 ? 2 : 0], 8);
  const row = width * colours;
  const lines = new Uint8Array(height * (row + 1));
  for (let y = 0; y < height; y++) lines.set(data.subarray(y * row, (y + 1) * row), y * (row + 1) + 1);
  const packed = new Blob([lines]).stream().pipeThrough(new CompressionStream("deflate"));
  const picture = new Uint8Array(await new Response(packed).arrayBuffer());
  const texts = Object.entries(words).map(([key, text]) => textChunk(key, String(text)));
  const signature = new Uint8Array([0x89, 0x50, 0x4e, 0x47, 13, 10, 26, 10]);
  return joined([signature, chunk("IHDR", header), ...texts, chunk("IDAT", picture), chunk("IEND", [])]);
}

function textChunk(key, text) {
  const plain = text.replaceAll("\0", " ");
  if (/^[\n -~\u00a0-\u00ff]*$/.test(plain)) return chunk("tEXt", latin(`${key}\0${plain}`));
  return chunk("iTXt", joined([latin(`${key}\0\0\0\0\0`), new TextEncoder().encode(plain)]));
}

function chunk(tag, data) {
  const body = joined([latin(tag), data]);
  const ends = new Uint8Array(8);
  new DataView(ends.buffer).setUint32(0, data.length);
  new DataView(ends.buffer).setUint32(4, crc(body));
  return joined([ends.subarray(0, 4), body, ends.subarray(4)]);
}

function crc(bytes) {
  let sum = 0xffffffff;
  for (const byte of bytes) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = sum & 1 ? (sum >>> 1) ^ 0xedb88320 : sum >>> 1;
  }
  return (sum ^ 0xffffffff) >>> 0;
}

function joined(parts) {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

const latin = (text) => Uint8Array.from(text, (letter) => letter.charCodeAt(0));

/** The nearest whole number, the even one of two. */
function even(value) {
  const down = Math.floor(value);
  const rest = value - down;
  return rest > 0.5 || (rest === 0.5 && down % 2) ? down + 1 : down;
}
