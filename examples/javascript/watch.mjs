// Prints the events of a site's boards as they come: node watch.mjs mqtt://HOST [SITE]. A user name and a password, if the
// broker wants them, are in AIFLOW_USER and AIFLOW_PASSWORD.
import mqtt from "mqtt";
import { ProtocolError, readEvent } from "./aiflow.mjs";

const [url = "mqtt://127.0.0.1:1883", site = "home"] = process.argv.slice(2);
const { AIFLOW_USER: username, AIFLOW_PASSWORD: password } = process.env;

// A caption is foreign text: control and bidirectional characters could change what a terminal shows.
const printable = (value) => String(value).replace(/\p{C}/gu, (character) => `\\u{${character.codePointAt(0).toString(16)}}`);

const client = mqtt.connect(url, { protocolVersion: 5, username, password });
client.on("error", (error) => console.error(error.message));
client.on("connect", () => {
  client.subscribe(`aiflow/${site}/+/up/event`, { qos: 1 }, (error) => console.error(error ? error.message : `watching ${site}`));
});
client.on("message", (topic, payload) => {
  const board = topic.split("/")[2];
  try {
    const event = readEvent(payload);
    const words = [event.captured, board, event.camera, event.type, event.label, event.text || event.why];
    console.log(words.filter(Boolean).map(printable).join("  "));
  } catch (error) {
    if (!(error instanceof ProtocolError)) throw error;
    console.error(printable(`${board}: ${error.message}`));
  }
});
