// A picture goes in, five guesses come out; everything happens on this device.
"use strict";
const GUESSES = 5;
const SHOWN = 12;
const CAMERA_PERIOD = 300;
const page = document.getElementById("try");
const status = document.getElementById("status");
const answers = document.getElementById("answers");
const input = document.getElementById("files");
const camera = document.getElementById("camera");
const worker = new Worker(page.dataset.engine);
const waiting = new Map();
let model;
let asked = 0;
let stream;

function ask(task, given, transfer) {
  const id = ++asked;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    worker.postMessage({ task, id, ...given }, transfer || []);
  });
}

worker.addEventListener("message", ({ data: { id, result, error, progress } }) => {
  if (progress) {
    const share = progress.total ? " of " + size(progress.total) : "";
    status.textContent = "Loading the model: " + size(progress.bytes) + share;
    return;
  }
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error) reject(new Error(error));
  else resolve(result);
});
worker.addEventListener("error", (event) => { status.textContent = "The engine cannot run in this browser: " + (event.message || "it was not found"); });

const size = (bytes) => (bytes < 1e6 ? Math.round(bytes / 1e3) + " kB" : (bytes / 1e6).toFixed(1) + " MB");

// What the network sees of a picture: the centre of what would be stored of it. A picture goes onto a white ground, from which the square
// at (left, top) is taken; all in the picture's pixels.
function square(width, height, { crop, resize }) {
  const wanted = resize.mode === "none" ? 1 : resize.size / (resize.mode === "cover" || resize.mode === "keep-ratio" ? Math.min : Math.max)(width, height);
  const scale = resize.upscale ? wanted : Math.min(1, wanted);
  const padded = resize.mode === "pad";
  const ground = padded ? { width: resize.size / scale, height: resize.size / scale } : { width, height };
  if (resize.mode === "cover") ground.width = ground.height = Math.min(width, height);
  const stored = { width: Math.round(ground.width * scale), height: Math.round(ground.height * scale) };
  if (Math.min(stored.width, stored.height) < crop) {
    throw new Error(`is stored as ${stored.width} x ${stored.height} pixels, and the model sees ${crop} x ${crop}`);
  }
  const margin = (whole, part) => Math.floor((whole - part) / 2);
  return {
    side: crop / scale,
    left: margin(width, ground.width) + margin(stored.width, crop) / scale,
    top: margin(height, ground.height) + margin(stored.height, crop) / scale,
  };
}

// Classifies what can be drawn, and shows it in a figure.
async function classify(source, width, height, figure) {
  const { side, left, top } = square(width, height, model);
  // Whole pixels around the square, on white.
  const [x, y] = [Math.floor(left), Math.floor(top)];
  const span = Math.ceil(Math.max(left - x, top - y) + side);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = span;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, span, span);
  context.drawImage(source, -x, -y);
  const pixels = new Uint8Array(context.getImageData(0, 0, span, span).data.buffer);
  const at = { left: Math.max(0, left - x), top: Math.max(0, top - y), side: Math.min(side, span) };
  const answer = await ask("classify", { pixels, width: span, height: span, ...at }, [pixels.buffer]);
  show(answer, canvas, figure);
  document.dispatchEvent(new CustomEvent("classified", { detail: answer }));
}

function show({ logits, millis }, canvas, figure) {
  const most = Math.max(...logits);
  const powers = [...logits].map((logit) => Math.exp(logit - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  const order = [...powers.keys()].sort((a, b) => powers[b] - powers[a]).slice(0, GUESSES);
  const rows = order.map((n) => {
    const { synset, name } = model.classes[n];
    const share = powers[n] / sum;
    const row = document.createElement("li");
    const label = document.createElement("span");
    label.textContent = name || synset;
    const number = document.createElement("span");
    number.textContent = (100 * share).toFixed(1) + " %";
    const bar = document.createElement("progress");
    bar.max = 1;
    bar.value = share;
    bar.setAttribute("aria-label", label.textContent);
    row.append(label, number, bar);
    return row;
  });
  const shown = figure.querySelector("canvas");
  shown.getContext("2d").drawImage(canvas, 0, 0, shown.width, shown.height);
  shown.setAttribute("aria-label", "what the model saw");
  figure.querySelector("ol").replaceChildren(...rows);
  figure.querySelector("figcaption small").textContent = `${Math.max(1, Math.round(millis))} ms`;
}

function figure(name) {
  const made = document.createElement("figure");
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 224;
  canvas.setAttribute("role", "img");
  const caption = document.createElement("figcaption");
  caption.append(name + " ", document.createElement("small"));
  const list = document.createElement("ol");
  made.append(canvas, caption, list);
  answers.prepend(made);
  while (answers.children.length > SHOWN) answers.lastChild.remove();
  return made;
}

async function take(files) {
  for (const file of files) {
    const made = figure(file.name || "picture");
    try {
      const conversion = model.resize.color === "as-is" ? "none" : "default";
      const picture = await createImageBitmap(file, { colorSpaceConversion: conversion }).catch(() => {
        throw new Error("this browser cannot read it as a picture");
      });
      await classify(picture, picture.width, picture.height, made);
      picture.close();
    } catch (error) {
      made.querySelector("ol").replaceChildren(Object.assign(document.createElement("li"), { textContent: error.message }));
    }
  }
}

async function film() {
  if (stream) {
    stream.getTracks().forEach((track) => track.stop());
    stream = undefined;
    camera.textContent = "Use the camera";
    return;
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    status.textContent = "The camera cannot be used: " + error.message;
    return;
  }
  camera.textContent = "Stop the camera";
  const video = Object.assign(document.createElement("video"), { srcObject: stream, muted: true, playsInline: true });
  const made = figure("camera");
  const mine = stream;
  try {
    await video.play();
    while (stream === mine && made.isConnected) {
      if (!document.hidden) await classify(video, video.videoWidth, video.videoHeight, made);
      await new Promise((resolve) => setTimeout(resolve, CAMERA_PERIOD));
    }
  } catch (error) {
    status.textContent = "The camera stopped: " + error.message;
  }
  if (stream === mine) await film();
}

async function begin() {
  try {
    model = await ask("load", { wasm: page.dataset.wasm, model: page.dataset.model });
  } catch (error) {
    status.textContent = location.protocol === "file:"
      ? "Browsers load no model from a file: serve this folder, such as by python3 -m http.server, and open it there."
      : "The model cannot be used: " + error.message;
    return;
  }
  status.textContent = `${model.classes.length} classes, ${size(model.bytes)}. Nothing leaves this device.`;
  input.disabled = false;
  camera.hidden = !(navigator.mediaDevices && navigator.mediaDevices.getUserMedia);
  input.addEventListener("change", () => { take(input.files); });
  camera.addEventListener("click", film);
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => { event.preventDefault(); take(event.dataTransfer.files); });
  addEventListener("paste", (event) => { take(event.clipboardData.files); });
  page.dataset.ready = "yes";
}

begin();
