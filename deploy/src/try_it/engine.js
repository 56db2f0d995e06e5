// Loads a model and asks it, beside the page, so that the page never stands still. Nothing is sent anywhere.
"use strict";
let engine;

// Calls the engine with bytes; its answer, or the reason why there is none.
function call(name, bytes, ...numbers) {
  const room = engine.room(bytes.length);
  new Uint8Array(engine.memory.buffer, room, bytes.length).set(bytes);
  const failed = engine[name](...numbers);
  const answer = new Uint8Array(engine.memory.buffer, engine.answer(), engine.answered()).slice();
  if (failed) throw new Error(new TextDecoder().decode(answer));
  return answer;
}

async function fetched(address, told) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(address + ": " + ((await response.text()) || response.status));
  const total = Number(response.headers.get("content-length"));
  const parts = [];
  let bytes = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    bytes += part.value.length;
    told(bytes, total);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

const tasks = {
  async load({ wasm, model }) {
    const code = await fetched(wasm, () => {});
    engine = (await WebAssembly.instantiate(code, {})).instance.exports;
    const bytes = await fetched(model, (bytes, total) => postMessage({ progress: { bytes, total } }));
    const description = JSON.parse(new TextDecoder().decode(call("load", bytes)));
    return { ...description, bytes: bytes.length };
  },
  classify({ pixels, width, height, left, top, side }) {
    const begun = performance.now();
    const logits = new Float32Array(call("classify", pixels, width, height, left, top, side).buffer);
    return { logits, millis: performance.now() - begun };
  },
};

addEventListener("message", async ({ data: { task, id, ...given } }) => {
  try {
    postMessage({ id, result: await tasks[task](given) });
  } catch (error) {
    postMessage({ id, error: String(error.message || error) });
  }
});
