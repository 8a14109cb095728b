// Pictures of passes: the tree with its accepted path, and the tokens that each pass brought. Values in, SVG out.

const SVG = "http://www.w3.org/2000/svg";

/** Where each node stands: x is its depth, y the middle of its children; leaves are evenly spaced. `parents` in breadth-first order. */
export function places(parents) {
  const children = parents.map(() => []);
  const depths = parents.map(() => 0);
  for (let node = 1; node < parents.length; node++) {
    children[parents[node]].push(node);
    depths[node] = depths[parents[node]] + 1;
  }
  const rows = parents.map(() => 0);
  let leaves = 0;
  const stack = [[0, false]];
  while (stack.length) {
    const [node, seen] = stack.pop();
    if (!children[node].length) {
      rows[node] = leaves++;
    } else if (seen) {
      rows[node] = (rows[children[node][0]] + rows[children[node].at(-1)]) / 2;
    } else {
      stack.push([node, true]);
      for (const child of children[node].toReversed()) stack.push([child, false]);
    }
  }
  return { depths, rows, levels: Math.max(...depths) + 1, leaves };
}

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** An edge a node, from its parent; the root's comes from the left margin, so that an accepted root shows. */
export function drawTree(svg, parents, path) {
  const { depths, rows, levels, leaves } = places(parents);
  const accepted = new Set(path);
  const edges = parents.map((parent, node) => {
    const [x0, y0] = parent < 0 ? [0, rows[0]] : [depths[parent] + 1, rows[parent]];
    const [x1, y1] = [depths[node] + 1, rows[node]];
    const middle = (x0 + x1) / 2;
    const kind = accepted.has(node) ? "edge accepted" : "edge";
    return shape("path", { d: `M${x0} ${y0}C${middle} ${y0} ${middle} ${y1} ${x1} ${y1}`, class: kind });
  });
  edges.sort((one, other) => one.classList.length - other.classList.length); // the accepted ones on top
  svg.setAttribute("viewBox", `-0.2 -1 ${levels + 0.4} ${leaves + 1}`);
  svg.setAttribute("aria-label", `a tree of ${parents.length} nodes, ${path.length} accepted`);
  svg.replaceChildren(...edges);
}

export function drawBars(svg, counts, most) {
  const highest = Math.max(1, ...counts);
  const bars = counts.map((count, number) =>
    shape("rect", { x: number + 0.1, y: highest - count, width: 0.8, height: count, class: "bar" }),
  );
  svg.setAttribute("viewBox", `0 -0.2 ${most} ${highest + 0.2}`);
  svg.setAttribute("aria-label", `tokens of the last ${counts.length} passes: ${counts.join(", ")}`);
  svg.replaceChildren(...bars);
}
