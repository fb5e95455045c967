// Small helpers over the DOM. Text only ever enters as text.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; a string becomes a text node. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Sets text only where it differs: the rest of the page keeps its layout. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Sets an attribute only where it differs; null takes it away. */
export function setAttribute(target, name, value) {
  if (value === null) target.removeAttribute(name);
  else if (target.getAttribute(name) !== String(value)) target.setAttribute(name, value);
}

/** A function that runs `work` at most once a frame, with its latest arguments. */
export function oncePerFrame(work) {
  let latest = null;
  return (...args) => {
    if (latest === null) {
      requestAnimationFrame(() => {
        const now = latest;
        latest = null;
        work(...now);
      });
    }
    latest = args;
  };
}
