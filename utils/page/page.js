// The episode viewer: a slider over the steps of an episode moves the frames of all cameras and a line over its curves.
// Everything else on the page stands in its HTML.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";

  function make(tag, attributes = {}, ...children) {
    const svg = ["svg", "path", "rect", "line", "circle"].includes(tag);
    const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children); // strings become text, never HTML
    return node;
  }

  const short = (value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(4))));

  // The index of the last of these ascending steps that is not after `step`.
  function lastUpTo(steps, step) {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle - 1;
    }
    return low;
  }

  function linePath(steps, values, y) {
    let path = "", begins = true;
    steps.forEach((step, i) => {
      const value = values[i];
      if (value !== null) path += `${begins ? "M" : "L"}${step} ${y(value).toFixed(2)}`;
      begins = value === null;
    });
    return path;
  }

  function bandPath(steps, low, high, y) {
    const known = steps.map((_, i) => i).filter((i) => low[i] !== null && high[i] !== null);
    if (known.length < 2) return "";
    const there = known.map((i) => `${steps[i]} ${y(high[i]).toFixed(2)}`);
    const back = known.reverse().map((i) => `${steps[i]} ${y(low[i]).toFixed(2)}`);
    return `M${there.join("L")}L${back.join("L")}Z`;
  }

  class Viewer {
    constructor(root) {
      const find = (name) => root.querySelector(`.${name}`);
      this.root = root;
      this.episodes = JSON.parse(find("data").textContent);
      for (const name of ["choose", "about", "films", "ticks", "step", "readout", "marks", "curves", "play"])
        this[name] = find(name);
      this.choose.addEventListener("change", () => this.open(Number(this.choose.value)));
      this.step.addEventListener("input", () => this.show(Number(this.step.value)));
      this.step.addEventListener("keydown", (event) => this.onKey(event));
      find("before").addEventListener("click", () => this.open(Math.max(0, this.number - 1)));
      find("after").addEventListener("click", () => this.open(Math.min(this.episodes.length - 1, this.number + 1)));
      this.play.addEventListener("click", () => this.toggle());
      if (!this.episodes.some((episode) => episode.curves.some((curve) => curve.predicted)))
        root.querySelector(".legend .predicted").remove();
      this.open(0);
    }

    // Page Up and Page Down are ten steps, whatever a browser makes of them; arrows, Home and End are the slider's own.
    onKey(event) {
      const move = { PageUp: 10, PageDown: -10 }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      this.show(this.now + move);
    }

    open(number, step = 0) {
      this.stop();
      this.number = number;
      this.choose.value = number;
      const episode = (this.episode = this.episodes[number]);
      this.step.max = episode.steps - 1;
      this.about.textContent = episode.text;
      this.films.replaceChildren(...episode.films.map((film) => this.makeFilm(film)));
      this.curves.replaceChildren(...this.makeCurves(episode));
      this.marks.replaceChildren(...episode.marks.map((mark) => this.makeMark(mark)));
      this.ticks.replaceChildren(...episode.marks.map((mark) => make("rect", {
        class: mark.tone, x: (1000 * mark.step) / Math.max(1, episode.steps - 1) - 2, y: 0, width: 4, height: 10,
      })));
      this.show(step);
    }

    makeFilm(film) {
      const canvas = make("canvas", { width: film.width, height: film.height, role: "img" });
      const picture = new Image();
      film.canvas = canvas;
      film.picture = picture;
      picture.addEventListener("load", () => this.draw(film));
      picture.src = film.source;
      return make("figure", {}, canvas, make("figcaption", {}, film.name));
    }

    draw(film) {
      const i = lastUpTo(film.steps, this.now), { width, height, columns } = film;
      const missing = film.missing.includes(i);
      film.canvas.setAttribute("aria-label", `${film.name}, step ${film.steps[i]}${missing ? ": no frame" : ""}`);
      film.canvas.dataset.frame = film.steps[i];
      if (!film.picture.complete || !film.picture.naturalWidth) return;
      const x = (i % columns) * width, y = Math.floor(i / columns) * height;
      film.canvas.getContext("2d").drawImage(film.picture, x, y, width, height, 0, 0, width, height);
    }

    makeMark(mark) {
      const button = make("button", { type: "button", class: mark.tone }, `step ${mark.step}: ${mark.text}`);
      button.addEventListener("click", () => this.show(mark.step));
      return make("li", {}, button);
    }

    makeCurves(episode) {
      this.cursors = [];
      const groups = new Map();
      for (const curve of episode.curves) {
        if (!groups.has(curve.group)) groups.set(curve.group, []);
        groups.get(curve.group).push(curve);
      }
      return [...groups].map(([name, curves]) =>
        make("section", { class: "group" }, make("h4", {}, name), ...curves.map((curve) => this.makeCurve(episode, curve))));
    }

    makeCurve(episode, curve) {
      const every = [curve.values, curve.predicted, curve.low, curve.high].flatMap((part) => part || []);
      const known = every.filter((value) => value !== null);
      let low = Math.min(...known), high = Math.max(...known);
      if (!(high > low)) [low, high] = known.length ? [low - 0.5, low + 0.5] : [0, 1];
      const y = (value) => 37 - (34 * (value - low)) / (high - low), last = Math.max(1, episode.steps - 1);
      const svg = make("svg", { viewBox: `0 0 ${last} 40`, preserveAspectRatio: "none", role: "img",
        "aria-label": `${curve.group} ${curve.name}, ${short(low)} to ${short(high)}` });
      if (curve.low && curve.high)
        svg.append(make("path", { class: "band line-1", d: bandPath(episode.sampled, curve.low, curve.high, y) }));
      for (const mark of episode.marks)
        svg.append(make("path", { class: `mark ${mark.tone}`, d: `M${mark.step} 0V40` }));
      for (const step of curve.marked)
        svg.append(make("path", { class: "value error", d: `M${step} 0V40` }));
      svg.append(make("path", { class: "line line-0", d: linePath(episode.sampled, curve.values, y) }));
      if (curve.predicted)
        svg.append(make("path", { class: "line line-1", d: linePath(episode.sampled, curve.predicted, y) }));
      const cursor = make("path", { class: "cursor", d: "M0 0V40" });
      svg.append(cursor);
      const value = make("span", { class: "value" });
      this.cursors.push({ cursor, value, curve });
      const scrub = (event) => {
        const box = svg.getBoundingClientRect();
        if (event.buttons) this.show(Math.round(((event.clientX - box.left) / box.width) * last));
      };
      svg.addEventListener("pointerdown", scrub);
      svg.addEventListener("pointermove", scrub);
      return make("div", { class: "curve" }, make("span", { class: "name" }, curve.name), svg, value);
    }

    show(step) {
      const episode = this.episode;
      this.now = Math.min(Math.max(step, 0), episode.steps - 1);
      this.step.value = this.now;
      const time = episode.rate ? ` · ${(this.now / episode.rate).toFixed(2)} s` : "";
      const text = `step ${this.now} of ${episode.steps - 1}${time}`;
      this.step.setAttribute("aria-valuetext", text);
      this.readout.textContent = text;
      episode.films.forEach((film) => this.draw(film));
      const i = lastUpTo(episode.sampled, this.now);
      for (const { cursor, value, curve } of this.cursors) {
        cursor.setAttribute("d", `M${this.now} 0V40`);
        value.textContent = short(curve.values[i]) + (curve.predicted ? ` / ${short(curve.predicted[i])}` : "");
      }
    }

    toggle() {
      if (this.timer) return this.stop();
      if (this.now >= this.episode.steps - 1) this.show(0);
      this.play.textContent = "pause";
      this.play.setAttribute("aria-pressed", "true");
      const rate = Math.min(this.episode.rate || 10, 60);
      let begun = performance.now(), first = this.now;
      const tick = (time) => {
        this.show(first + Math.floor(((time - begun) / 1000) * rate));
        if (this.now >= this.episode.steps - 1) this.stop(); else this.timer = requestAnimationFrame(tick);
      };
      this.timer = requestAnimationFrame(tick);
    }

    stop() {
      if (this.timer) cancelAnimationFrame(this.timer);
      this.timer = null;
      this.play.textContent = "play";
      this.play.setAttribute("aria-pressed", "false");
    }
  }

  const viewers = [...document.querySelectorAll(".viewer")].map((root) => new Viewer(root));
  for (const button of document.querySelectorAll(".jump"))
    button.addEventListener("click", () => {
      viewers[0].open(Number(button.dataset.episode), Number(button.dataset.step));
      viewers[0].root.scrollIntoView({ block: "start" });
      viewers[0].step.focus({ preventScroll: true });
    });
})();
