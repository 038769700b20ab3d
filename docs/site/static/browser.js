// docs/browser: the exported integer files in ONNX Runtime's WebAssembly, on a drawing or a picture.
"use strict";

(() => {
  const home = new URL(".", document.currentScript.src);
  const place = document.querySelector("#browser");
  const RUNS = 5; // of a network for one picture
  const label = { mnist: "digits (MNIST)", fashion_mnist: "clothes (Fashion-MNIST)", cifar10: "animals and vehicles (CIFAR-10)" };

  // ---- files: a page that is opened as a file may load scripts, but not fetch

  const script = (path) =>
    new Promise((resolve, reject) => {
      const element = document.createElement("script");
      element.src = new URL(path, home);
      element.onload = resolve;
      element.onerror = () => reject(new Error(`${path} cannot be loaded`));
      document.head.append(element);
    });

  /** What `make` makes, once; after an error it is made anew. */
  const once = (kept, name, make) =>
    (kept[name] ??= make().catch((error) => {
      delete kept[name];
      throw error;
    }));

  const files = {};
  const file = (path, name) =>
    once(files, path, async () => {
      await script(path);
      const bytes = Uint8Array.from(atob(window.zooFiles[name]), (char) => char.charCodeAt(0));
      delete window.zooFiles[name];
      return bytes;
    });

  const unpacked = async (name) => {
    const packed = new Blob([await file(`vendor/${name}.js`, name)]).stream();
    return new Response(packed.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  };

  // ---- networks

  const runtimes = {};
  const runtime = () =>
    once(runtimes, "wasm", async () => {
      const [code, binary] = await Promise.all(
        ["ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"].map(unpacked),
      );
      ort.env.wasm.numThreads = 1;
      ort.env.wasm.wasmBinary = binary;
      ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(new Blob([code], { type: "text/javascript" })) };
    });

  const sessions = {};
  const session = (model) =>
    once(sessions, model.name, async () => {
      await runtime();
      const made = await ort.InferenceSession.create(await file(`models/${model.name}.js`, model.name));
      await run(made, model, new Uint8Array(model.in_chans * model.size ** 2)); // compiles what the first run needs
      return made;
    });

  const run = async (made, model, pixels) => {
    const image = new ort.Tensor("uint8", pixels, [1, model.in_chans, model.size, model.size]);
    const { [made.outputNames[0]]: result } = await made.run({ [made.inputNames[0]]: image });
    return [...result.data];
  };

  // one network at a time, so that times are those of one alone
  let last = Promise.resolve();
  const oneByOne = (work) => (last = last.catch(() => {}).then(work));

  /** The integer outputs of a network for uint8 pixels [channels, size, size], and the median time of some runs. */
  const scores = (name, pixels) =>
    oneByOne(async () => {
      const model = zooModels.find((each) => each.name === name);
      const made = await session(model);
      const times = [];
      let accumulators;
      for (let i = 0; i < RUNS; i++) {
        const start = performance.now();
        accumulators = await run(made, model, Uint8Array.from(pixels));
        times.push(performance.now() - start);
      }
      return { accumulators, milliseconds: times.sort((a, b) => a - b)[(RUNS - 1) / 2] };
    });

  const probabilities = (accumulators, scale) => {
    const largest = Math.max(...accumulators);
    const exponentials = accumulators.map((value) => Math.exp((value - largest) * scale));
    const sum = exponentials.reduce((a, b) => a + b);
    return exponentials.map((value) => value / sum);
  };

  // ---- images

  const canvas = (width, height) => Object.assign(document.createElement("canvas"), { width, height });
  const context = (element) => element.getContext("2d", { willReadFrequently: true });

  /** Draw a picture on a square canvas: the shorter side becomes `side`, and the centre is kept. */
  const squared = (picture, side) => {
    const target = canvas(side, side);
    const pen = context(target);
    pen.fillRect(0, 0, side, side); // transparent parts become black
    pen.imageSmoothingQuality = "high";
    const ratio = side / Math.min(picture.width, picture.height);
    const [width, height] = [Math.floor(picture.width * ratio), Math.floor(picture.height * ratio)];
    pen.drawImage(picture, Math.round((side - width) / 2), Math.round((side - height) / 2), width, height);
    return target;
  };

  /** A drawing as MNIST's digits are: 20 pixels high or wide, with the centre of mass in the middle. */
  const centred = (drawing, side) => {
    const { width, height } = drawing;
    const { data } = context(drawing).getImageData(0, 0, width, height);
    let [left, top, right, bottom] = [width, height, -1, -1];
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++)
        if (data[4 * (y * width + x)] > 40) {
          [left, right] = [Math.min(left, x), Math.max(right, x)];
          [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
        }
    if (right < 0) return null; // nothing is drawn
    const [w, h] = [right - left + 1, bottom - top + 1];
    const ratio = 20 / Math.max(w, h);
    const placed = (x, y) => {
      const target = canvas(side, side);
      const pen = context(target);
      pen.fillRect(0, 0, side, side);
      pen.imageSmoothingQuality = "high";
      pen.drawImage(drawing, left, top, w, h, x, y, w * ratio, h * ratio);
      return target;
    };
    const [x, y] = [(side - w * ratio) / 2, (side - h * ratio) / 2];
    const pixels = context(placed(x, y)).getImageData(0, 0, side, side).data;
    let [mass, sumX, sumY] = [0, 0, 0];
    for (let i = 0; i < side * side; i++) {
      mass += pixels[4 * i];
      sumX += pixels[4 * i] * (i % side);
      sumY += pixels[4 * i] * Math.floor(i / side);
    }
    const shift = (sum) => Math.round((side - 1) / 2 - sum / mass);
    return placed(x + shift(sumX), y + shift(sumY));
  };

  /** The pixels of a canvas as a network takes them: uint8 [channels, size, size], padded with black. */
  const pixelsOf = (picture, model) => {
    const { data } = context(picture).getImageData(0, 0, picture.width, picture.height);
    const margin = (model.size - model.image_size) / 2;
    const pixels = new Uint8Array(model.in_chans * model.size ** 2);
    for (let y = 0; y < model.image_size; y++)
      for (let x = 0; x < model.image_size; x++) {
        const rgb = data.subarray(4 * (y * model.image_size + x));
        const grey = (rgb[0] * 19595 + rgb[1] * 38470 + rgb[2] * 7471 + 32768) >> 16; // as Pillow computes luma
        for (let c = 0; c < model.in_chans; c++)
          pixels[(c * model.size + y + margin) * model.size + x + margin] = model.in_chans === 1 ? grey : rgb[c];
      }
    return pixels;
  };

  // ---- the page

  place.innerHTML = `
    <div class="controls">
      <label>Networks for <select></select></label>
      <label class="file">choose a picture<input type="file" accept="image/*"></label>
      <button type="button">clear</button>
    </div>
    <div class="pads">
      <figure><canvas class="draw" width="280" height="280"></canvas><figcaption></figcaption></figure>
      <figure><canvas class="seen"></canvas><figcaption>what the networks see</figcaption></figure>
    </div>
    <p class="status" role="status"></p>
    <div class="results"></div>`;
  const [choice, input, clear] = ["select", "input", "button"].map((tag) => place.querySelector(tag));
  const [pad, seen] = [".draw", ".seen"].map((name) => place.querySelector(name));
  const [status, results, hint] = [".status", ".results", "figcaption"].map((name) => place.querySelector(name));
  const pen = context(pad);
  Object.assign(pen, { lineWidth: 22, lineCap: "round", lineJoin: "round", strokeStyle: "#fff" });
  for (const dataset of new Set(zooModels.map((model) => model.dataset))) choice.add(new Option(label[dataset], dataset));

  const models = () => zooModels.filter((model) => model.dataset === choice.value);
  const megabytes = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
  let latest = 0; // number of the newest picture: results of older ones are not shown

  const classify = async (picture) => {
    const number = ++latest;
    const shown = models();
    seen.width = seen.height = shown[0].image_size;
    context(seen).drawImage(picture, 0, 0);
    status.textContent = "loading ...";
    try {
      for (const model of shown) {
        const { accumulators, milliseconds } = await scores(model.name, pixelsOf(picture, model));
        if (number !== latest) return;
        show(model, probabilities(accumulators, model.scale), milliseconds);
      }
      status.textContent = "";
    } catch (error) {
      status.textContent = `The networks could not be run: ${error.message}`;
    }
  };

  const show = (model, values, milliseconds) => {
    const order = values.map((_, index) => index).sort((a, b) => values[b] - values[a]);
    const card = results.querySelector(`[data-model="${model.name}"]`);
    card.querySelector(".best").textContent = model.classes[order[0]];
    card.querySelector(".time").textContent = `${milliseconds.toFixed(1)} ms`;
    card.querySelector(".bars").replaceChildren(
      ...order.slice(0, 3).map((index) => {
        const bar = document.createElement("div");
        bar.className = "bar";
        bar.innerHTML = `<span></span><meter max="1"></meter><span></span>`;
        bar.children[0].textContent = model.classes[index];
        bar.children[1].value = values[index];
        bar.children[2].textContent = `${(100 * values[index]).toFixed(1)} %`;
        return bar;
      }),
    );
  };

  const start = () => {
    latest++;
    pen.fillRect(0, 0, pad.width, pad.height);
    seen.width = seen.height = models()[0].image_size;
    status.textContent = "";
    hint.textContent = choice.value === "mnist" ? "draw a digit, or drop a picture" : "drop a picture";
    results.replaceChildren(
      ...models().map((model) => {
        const card = document.createElement("div");
        card.className = "result";
        card.dataset.model = model.name;
        card.innerHTML = `<strong></strong><br><small></small><p class="best">?</p><div class="bars"></div><small class="time"></small>`;
        card.children[0].textContent = `${model.w_bits}-bit weights, ${model.a_bits}-bit activations`;
        card.children[2].textContent = `${megabytes(model.bytes)}, ${model.accuracy.toFixed(2)} % of the test set`;
        return card;
      }),
    );
  };

  const take = async (chosen) => {
    if (!chosen) return;
    try {
      const picture = await createImageBitmap(chosen, { colorSpaceConversion: "none" });
      pen.fillRect(0, 0, pad.width, pad.height);
      pen.drawImage(squared(picture, pad.width), 0, 0);
      await classify(squared(picture, models()[0].image_size));
    } catch {
      status.textContent = `${chosen.name} is not a picture that this browser reads`;
    }
  };

  const at = (event) => {
    const box = pad.getBoundingClientRect();
    return [((event.clientX - box.left) * pad.width) / box.width, ((event.clientY - box.top) * pad.height) / box.height];
  };
  let drawing = false;
  pad.addEventListener("pointerdown", (event) => {
    drawing = choice.value === "mnist";
    if (!drawing) return;
    pad.setPointerCapture(event.pointerId);
    pen.beginPath();
    pen.moveTo(...at(event));
    pen.lineTo(...at(event));
    pen.stroke();
  });
  pad.addEventListener("pointermove", (event) => {
    if (!drawing) return;
    pen.lineTo(...at(event));
    pen.stroke();
  });
  for (const name of ["pointerup", "pointercancel"])
    pad.addEventListener(name, () => {
      if (!drawing) return;
      drawing = false;
      const digit = centred(pad, models()[0].image_size);
      if (digit) classify(digit);
    });
  for (const [name, on] of [["dragover", true], ["dragleave", false], ["drop", false]])
    place.addEventListener(name, (event) => {
      event.preventDefault();
      pad.classList.toggle("dropping", on);
      if (name === "drop") take(event.dataTransfer.files[0]);
    });
  input.addEventListener("change", () => take(input.files[0]).then(() => (input.value = "")));
  choice.addEventListener("change", start);
  clear.addEventListener("click", start);
  start();
  window.zoo = { scores };
})();
