// Reads the replies and events of docs/protocol.md. It runs in browsers and Node, and depends on nothing.
// The sections in comments are those of docs/protocol.md.

const MAX_REPLY = 262144; // bytes, section 4
const MAX_EVENT = 65536; // bytes, section 7
const MAX_DEPTH = 8; // arrays and maps inside one another; a reply has four
const STATUSES = ["ok", "stale", "busy", "unknown bundle", "bad request", "failed", "reference lost"];
const TIERS = ["device", "edge", "cloud"];
const TIME = /^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,6})?Z$/;
const EVENT_TYPES = ["new", "update", "lost", "trigger"];

/** A message breaks a rule of the protocol. */
export class ProtocolError extends Error {}

/**
 * A reply, from its bytes (Uint8Array): an object with the fields of section 4, tokens as an array, id in hexadecimal,
 * status and tiers as words. Throws ProtocolError.
 */
export function readReply(bytes) {
  refuse(bytes.length > MAX_REPLY, `reply has ${bytes.length} bytes`);
  const array = unpack(bytes);
  refuse(!Array.isArray(array) || array[0] !== 1, "not a reply of version 1");
  const reply = {};
  REPLY.forEach(([name, missing, read], position) => {
    const value = position < array.length ? array[position] : missing;
    reply[name] = attempt(name, () => read(value));
  });
  return reply;
}

/** An event, from its bytes: the object of section 7, with its defaults. Throws ProtocolError. */
export function readEvent(bytes) {
  refuse(bytes.length > MAX_EVENT, `event has ${bytes.length} bytes`);
  let event;
  try {
    event = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new ProtocolError(`event is not JSON: ${error.message}`);
  }
  refuse(typeof event !== "object" || event === null || Array.isArray(event), "event is not an object");
  event = { version: 1, final: false, text: "", ...event };
  refuse(event.version !== 1, `event has version ${event.version}`);
  refuse(!EVENT_TYPES.includes(event.type), "event has an unknown type");
  for (const [name, most] of [["frame", 64], ["camera", 64], ["text", 8192], ["captured", 27]]) {
    attempt(name, () => text(most)(event[name]));
  }
  refuse(!TIME.test(event.captured) || Number.isNaN(Date.parse(event.captured)), "captured is not a time in UTC");
  refuse(typeof event.final !== "boolean", "final is not true or false");
  return event;
}

// ---- the fields of a reply ----

function refuse(isBad, why) {
  if (isBad) throw new ProtocolError(why);
}

function attempt(name, read) {
  try {
    return read();
  } catch (error) {
    throw new ProtocolError(`${name}: ${error.message}`);
  }
}

const orNull = (read) => (value) => (value === null ? null : read(value));

function whole(most) {
  return (value) => {
    refuse(!Number.isInteger(value) || value < 0 || value > most, `want an integer of at most ${most}`);
    return value;
  };
}

function number(most) {
  return (value) => {
    refuse(typeof value !== "number" || !(value >= 0 && value <= most), `want a number of at most ${most}`);
    return value;
  };
}

function text(most) {
  return (value) => {
    // A character of the protocol is a code point; a string of JavaScript counts UTF-16 units.
    refuse(typeof value !== "string" || [...value].length > most, `want a text of at most ${most} characters`);
    return value;
  };
}

function bool(value) {
  refuse(typeof value !== "boolean", "want true or false");
  return value;
}

function map(most, read) {
  return (value) => {
    refuse(!(value instanceof Map) || value.size > most, `want a map of at most ${most} entries`);
    // Without a prototype, a label such as __proto__ is a key like any other.
    const object = Object.create(null);
    for (const [key, item] of value) object[text(64)(key)] = read(item);
    return object;
  };
}

function list(most, read) {
  return (value) => {
    refuse(!Array.isArray(value) || value.length > most, `want an array of at most ${most}`);
    return value.map(read);
  };
}

const word = (words) => (value) => words[whole(words.length - 1)(value)];
const count = whole(0xffffffff);
const share = number(1);

function id(value) {
  refuse(!(value instanceof Uint8Array) || value.length !== 8, "want 8 bytes");
  return [...value].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function tokenIds(value) {
  refuse(!(value instanceof Uint8Array), "want bytes");
  const ids = [];
  let current = 0;
  let shift = 0;
  for (const byte of value) {
    current += (byte & 127) * 2 ** shift;
    shift += 7;
    refuse(current > 1048575 || (byte === 0 && shift > 7), "want token ids in their shortest form");
    if (byte < 128) {
      ids.push(current);
      [current, shift] = [0, 0];
    } else {
      refuse(shift > 14, "want token ids of at most 3 bytes");
    }
  }
  refuse(shift > 0, "the last token id is cut");
  refuse(ids.length > 1024, "want at most 1,024 token ids");
  return ids;
}

function usage(value) {
  const [inputTokens, outputTokens, cost, currency = ""] = list(Infinity, (item) => item)(value);
  return {
    inputTokens: count(inputTokens),
    outputTokens: count(outputTokens),
    cost: orNull(number(1e9))(cost),
    currency: text(8)(currency),
  };
}

function hop(value) {
  const [tier, server, queueMs, computeMs, stages = null, used = null] = list(Infinity, (item) => item)(value);
  return {
    tier: word(TIERS)(tier),
    server: text(64)(server),
    queueMs: number(1e9)(queueMs),
    computeMs: number(1e9)(computeMs),
    stagesMs: orNull(map(32, number(1e9)))(stages),
    usage: orNull(usage)(used),
  };
}

function checked(value) {
  const [schema, valid] = list(Infinity, (item) => item)(value);
  return { schema: text(64)(schema), valid: bool(valid) };
}

// In the order of section 4: name, default, and what reads it. Without a default, undefined is refused.
const REPLY = [
  ["version", undefined, whole(1)],
  ["id", undefined, id],
  ["status", undefined, word(STATUSES)],
  ["tokens", new Uint8Array(), tokenIds],
  ["text", "", text(8192)],
  ["tier", 1, word(TIERS)],
  ["server", "", text(64)],
  ["accepted", 0, count],
  ["proposed", 0, count],
  ["passes", 0, count],
  ["confidence", null, orNull(share)],
  ["hops", [], list(16, hop)],
  ["error", "", text(1024)],
  ["retryAfterMs", null, orNull(count)],
  ["label", null, orNull(text(64))],
  ["scores", null, orNull(map(64, share))],
  ["final", true, bool],
  ["answers", null, orNull(map(16, map(64, share)))],
  ["unsure", false, bool],
  ["isReference", false, bool],
  ["checked", null, orNull(checked)],
  ["isCut", false, bool],
];

// ---- msgpack ----

/** One msgpack value. Maps become Map, bin becomes Uint8Array. Throws ProtocolError. */
export function unpack(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  let at = 0;

  function take(size) {
    refuse(size > bytes.length - at, "message ends early");
    at += size;
    return at - size;
  }
  function unsigned(size) {
    const start = take(size);
    return size === 1 ? view.getUint8(start) : size === 2 ? view.getUint16(start) : view.getUint32(start);
  }
  const binary = (length) => bytes.slice(take(length), at);

  function string(length) {
    try {
      return utf8.decode(binary(length));
    } catch (error) {
      throw error instanceof ProtocolError ? error : new ProtocolError("text is not UTF-8");
    }
  }

  function array(length, depth) {
    refuse(depth === MAX_DEPTH, "message is nested too deeply");
    refuse(length > bytes.length - at, "message ends early"); // nothing is allocated for what cannot be there
    return Array.from({ length }, () => value(depth + 1));
  }

  function entries(length, depth) {
    const items = array(2 * length, depth);
    const result = new Map();
    for (let index = 0; index < items.length; index += 2) result.set(items[index], items[index + 1]);
    return result;
  }

  function value(depth) {
    const first = unsigned(1);
    if (first < 0x80) return first;
    if (first < 0x90) return entries(first & 15, depth);
    if (first < 0xa0) return array(first & 15, depth);
    if (first < 0xc0) return string(first & 31);
    if (first >= 0xe0) return first - 256;
    switch (first) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: case 0xc5: case 0xc6: return binary(unsigned(1 << (first - 0xc4)));
      case 0xca: return view.getFloat32(take(4));
      case 0xcb: return view.getFloat64(take(8));
      case 0xcc: case 0xcd: case 0xce: return unsigned(1 << (first - 0xcc));
      case 0xcf: return Number(view.getBigUint64(take(8)));
      case 0xd0: return view.getInt8(take(1));
      case 0xd1: return view.getInt16(take(2));
      case 0xd2: return view.getInt32(take(4));
      case 0xd3: return Number(view.getBigInt64(take(8)));
      case 0xd9: case 0xda: case 0xdb: return string(unsigned(1 << (first - 0xd9)));
      case 0xdc: case 0xdd: return array(unsigned(2 << (first - 0xdc)), depth);
      case 0xde: case 0xdf: return entries(unsigned(2 << (first - 0xde)), depth);
      default: throw new ProtocolError(`msgpack type ${first}`);
    }
  }

  const result = value(0);
  refuse(at !== bytes.length, "bytes are left over");
  return result;
}
