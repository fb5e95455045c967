// Colours as custom properties of the root, each for both themes: whoever uses them need not know which is on.

export const NUM_LEVELS = 32;

/** `--level-0` … `--level-31`: even steps of lightness, so that the order is seen without telling hues apart. */
export function defineLevels() {
  for (let level = 0; level < NUM_LEVELS; level += 1) {
    const t = level / (NUM_LEVELS - 1);
    const light = oklch(0.965 - 0.6 * t, 0.012 + 0.145 * Math.sin((Math.PI * t) / 1.6), 225 + 50 * t);
    const dark = oklch(0.27 + 0.65 * t, 0.03 + 0.085 * Math.sin(Math.PI * 0.85 * t), 280 - 85 * t);
    define(`--level-${level}`, light, dark);
  }
}

/** `--expert-0` …: backgrounds that the page's ink is read on. Neighbours differ in lightness too. */
export function defineExperts(numExperts) {
  for (let expert = 0; expert < numExperts; expert += 1) {
    const [hue, step] = place(expert, numExperts);
    define(
      `--expert-${expert}`,
      oklch(0.91 - 0.08 * step, 0.07 + 0.035 * step, hue),
      oklch(0.36 + 0.08 * step, 0.07 + 0.025 * step, hue),
    );
  }
}

/** Few experts: around the circle, light and darker in turn. Many: the golden angle, over three lightnesses. */
function place(expert, numExperts) {
  if (numExperts <= 12) return [(360 * expert) / numExperts + 25, expert % 2];
  return [(137.508 * expert + 25) % 360, (expert % 3) / 2];
}

export function expertColour(expert) {
  return expert === null ? "transparent" : `var(--expert-${expert})`;
}

function oklch(lightness, chroma, hue) {
  return `oklch(${lightness.toFixed(3)} ${chroma.toFixed(3)} ${hue.toFixed(1)})`;
}

function define(name, light, dark) {
  document.documentElement.style.setProperty(name, `light-dark(${light}, ${dark})`);
}
