// Names the point nearest to the pointer. The drawing itself needs no script.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const reach = 60; // Pixels from a point at which it still answers.

  function nearest(series, x, y) {
    let best = null, bestDistance = reach * reach;
    for (const line of series) {
      for (const point of line.points) {
        const dx = point[0] - x, dy = point[1] - y;
        // A validation point wins over the training curve that runs through it.
        const far = dx * dx + dy * dy + (line.name.startsWith("training") ? 40 : 0);
        if (far < bestDistance) { bestDistance = far; best = { line, point }; }
      }
    }
    return best;
  }

  function show(svg, ring, found, event) {
    const [x, y, step, flops, value] = found.point;
    ring.setAttribute("class", "ring " + found.line.style);
    ring.setAttribute("cx", x);
    ring.setAttribute("cy", y);
    svg.appendChild(ring);
    tip.textContent = `${found.line.label}\n${found.line.name} ${value}\nstep ${step} · ${flops} FLOPs`;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const right = event.clientX + 16 + box.width < window.innerWidth;
    tip.style.left = Math.max(4, right ? event.clientX + 16 : event.clientX - box.width - 12) + "px";
    tip.style.top = Math.max(4, event.clientY - box.height - 12) + "px";
  }

  for (const svg of document.querySelectorAll("svg[data-points]")) {
    const series = JSON.parse(svg.dataset.points);
    const ring = document.createElementNS(svg.namespaceURI, "circle");
    ring.setAttribute("r", 6);
    const hide = () => { tip.hidden = true; ring.remove(); };
    const move = (event) => {
      const box = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      const found = nearest(series, x, y);
      if (found) show(svg, ring, found, event); else hide();
    };
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", hide);
  }
})();
