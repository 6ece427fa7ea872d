// Reads [[kind, payload in hexadecimal], ...] from standard input with examples/javascript, and prints what it has read.
import { readFileSync } from "node:fs";
import { ProtocolError, readEvent, readReply } from "../../examples/javascript/aiflow.mjs";

const readers = { reply: readReply, event: readEvent };
const results = JSON.parse(readFileSync(0)).map(([kind, payload]) => {
  try {
    return readers[kind](new Uint8Array(Buffer.from(payload, "hex")));
  } catch (error) {
    if (!(error instanceof ProtocolError)) throw error;
    return { refused: error.message };
  }
});
console.log(JSON.stringify(results));
