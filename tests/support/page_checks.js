// What is wrong with a page, in the words of a list: the checks of tests/support/page_checks.py. One expression.
(() => {
  const shown = (node) => node.checkVisibility({ visibilityProperty: true, contentVisibilityAuto: true });
  const all = (selector) => Array.from(document.querySelectorAll(selector)).filter(shown);
  const tell = (node) => {
    const name = node.nodeName.toLowerCase();
    const kind = node.getAttribute("class");
    return name + (node.id ? "#" + node.id : kind ? "." + kind : "");
  };
  const texts = (ids) => ids.split(/\s+/).map((id) => document.getElementById(id)?.textContent ?? "").join(" ").trim();
  const nameOf = (node) =>
    (node.hasAttribute("aria-labelledby") && texts(node.getAttribute("aria-labelledby"))) ||
    node.getAttribute("aria-label")?.trim() ||
    Array.from(node.labels ?? [], (label) => label.textContent.trim()).join(" ").trim() ||
    (node.matches("button, a, summary, [role=option]") && node.textContent.trim()) ||
    node.getAttribute("title")?.trim() || "";
  const found = [];
  const none = (nodes, what) => nodes.forEach((node) => found.push(`${tell(node)}: ${what}`));

  if (!document.title.trim()) found.push("the document has no title");
  if (!document.documentElement.lang) found.push("the document has no language");
  if (document.querySelectorAll("h1").length !== 1) found.push("the document has not one h1");
  if (all("main").length !== 1) found.push("the document has not one main");
  const headings = all("h1, h2, h3, h4, h5, h6").filter((node) => !node.closest("dialog"));
  headings.forEach((node, i) => {
    if (i && Number(node.nodeName[1]) > Number(headings[i - 1].nodeName[1]) + 1) none([node], "a level is left out above");
  });
  none(headings.filter((node) => !node.textContent.trim()), "empty heading");
  const ids = Array.from(document.querySelectorAll("[id]"), (node) => node.id);
  [...new Set(ids.filter((id, i) => ids.indexOf(id) !== i))].forEach((id) => found.push(`#${id} is there twice`));
  for (const attribute of ["aria-labelledby", "aria-describedby", "aria-controls", "for", "aria-activedescendant"]) {
    none(Array.from(document.querySelectorAll(`[${attribute}]`)).filter((node) =>
      node.getAttribute(attribute).split(/\s+/).some((id) => !document.getElementById(id))), `${attribute} leads nowhere`);
  }

  const controls = "button, a[href], input, select, textarea, summary, [role=listbox], [role=option], [role=group], [role=region], section[aria-labelledby], form[role], dialog[open]";
  none(all(controls).filter((node) => !nameOf(node)), "has no name");
  none(all("svg").filter((node) => node.getAttribute("aria-hidden") !== "true"
    && !(node.getAttribute("role") === "img" && nameOf(node)) && !node.parentElement.closest("[role=img]")), "has no name");
  none(all("img").filter((node) => !node.hasAttribute("alt")), "has no alt");
  none(all("th").filter((node) => !node.hasAttribute("scope") && node.textContent.trim()), "has no scope");
  none(all("table").filter((node) => !node.caption && !node.closest("[aria-labelledby], [aria-label]")), "has no caption");
  none(Array.from(document.querySelectorAll("[tabindex]")).filter((node) => node.tabIndex > 0), "positive tabindex");
  none(all("[aria-hidden=true]").filter((node) => node.querySelector("a[href], button, input, select, textarea")), "hidden from some, with a control");
  none(all("button button, a a, a button, button a"), "control in a control");
  none(all("dl > *").filter((node) => !node.matches("div, dt, dd")), "not of a dl");
  none(all("ul > *, ol > *").filter((node) => !node.matches("li")), "not of a list");
  none(all("*").filter((node) => ["auto", "scroll"].includes(getComputedStyle(node).overflowX) && node.scrollWidth > node.clientWidth + 1
    && node.tabIndex < 0 && !node.querySelector("a[href], button, input, select, textarea, summary, [tabindex='0']")), "scrolls, but not by the keyboard");
  none(Array.from(document.querySelectorAll("*")).filter((node) => Array.from(node.attributes).some((a) => /^on/.test(a.name))), "has a script of its own");
  none(Array.from(document.querySelectorAll("[src], link, [href^='http'], iframe, object, embed, base")), "leads out of the page");

  // Contrast of each text with what is behind it (WCAG 2.2, 1.4.3); controls that are off are exempt.
  const parse = (color) => {
    const numbers = color.match(/[\d.]+/g).map(Number);
    return { rgb: numbers.slice(0, 3), alpha: numbers[3] ?? 1 };
  };
  const over = (top, bottom) => top.rgb.map((value, i) => value * top.alpha + bottom[i] * (1 - top.alpha));
  const ground = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    const canvas = matchMedia("(prefers-color-scheme: dark)").matches && !matchMedia("print").matches ? [18, 18, 18] : [255, 255, 255];
    return layers.reverse().reduce((below, layer) => over(layer, below), canvas);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => value / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const off = (node) => node.closest(":disabled") !== null;
  const checked = (node, color, what) => {
    const style = getComputedStyle(node);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && Number(style.fontWeight) >= 700);
    const behind = ground(node);
    const value = ratio(over({ ...parse(color), alpha: parse(color).alpha * opacity(node) }, behind), behind);
    if (value < (large ? 3 : 4.5)) found.push(`${tell(node)}: contrast ${value.toFixed(2)}${what}`);
  };
  const opacity = (node) => {
    let value = 1;
    for (let at = node; at; at = at.parentElement) value *= Number(getComputedStyle(at).opacity);
    return value;
  };
  const withText = (node) => Array.from(node.childNodes).some((child) => child.nodeType === 3 && child.data.trim());
  all("body *").filter((node) => withText(node) && !off(node)).forEach((node) => {
    const style = getComputedStyle(node);
    checked(node, node instanceof SVGElement ? style.fill : style.color, "");
  });
  all("input[placeholder]").forEach((node) => checked(node, getComputedStyle(node, "::placeholder").color, " of the placeholder"));
  // Borders of controls (1.4.11).
  all("button, select, input[type=search]").filter((node) => !off(node)).forEach((node) => {
    const value = ratio(parse(getComputedStyle(node).borderTopColor).rgb, ground(node.parentElement));
    if (value < 3) found.push(`${tell(node)}: contrast ${value.toFixed(2)} of the border`);
  });
  if (document.documentElement.scrollWidth > document.documentElement.clientWidth) {
    found.push(`the page is ${document.documentElement.scrollWidth} px wide`);
  }
  return [...new Set(found)];
})()
