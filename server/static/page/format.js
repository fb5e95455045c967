// Numbers as people read them. A missing value is a dash.

const DASH = "–";
const whole = new Intl.NumberFormat("en");
const UNITS = ["", " K", " M", " B", " T"];

export const count = (value) => (value === null ? DASH : whole.format(Math.round(value)));

export const decimal = (value, digits = 2) => (value === null ? DASH : value.toFixed(digits));

export const percent = (share, digits = 1) => (share === null ? DASH : `${(100 * share).toFixed(digits)} %`);

/** 12.9 B, 214 M. */
export function large(value) {
  if (value === null) return DASH;
  let unit = 0;
  let left = value;
  while (left >= 999.5 && unit < UNITS.length - 1) {
    left /= 1000;
    unit += 1;
  }
  return `${left >= 100 || unit === 0 ? Math.round(left) : left.toFixed(1)}${UNITS[unit]}`;
}

export function bytes(value) {
  return value === null ? DASH : `${large(value)}${value < 999.5 ? " " : ""}B`.replace("BB", "GB").replace("KB", "kB");
}

/** Seconds as milliseconds, or seconds from ten of them on. */
export function duration(seconds) {
  if (seconds === null) return DASH;
  if (seconds >= 10) return `${seconds.toFixed(1)} s`;
  const ms = 1000 * seconds;
  return `${ms >= 100 ? Math.round(ms) : ms.toFixed(1)} ms`;
}
