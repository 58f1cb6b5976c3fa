// How are figures written for people? As in the terminal (pdtasks/terminal/figures.py).

export const NOTHING = "–";

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return NOTHING;
  if (seconds < 0.0995) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 0.9995) return `${(seconds * 1000).toFixed(0)} ms`;
  if (seconds < 99.95) return `${seconds.toFixed(1)} s`;
  const minutes = Math.round(seconds / 60);
  const hours = Math.floor(minutes / 60);
  const days = Math.floor(hours / 24);
  if (days) return `${days} d ${hours % 24} h`;
  return hours ? `${hours} h ${minutes % 60} min` : `${minutes} min`;
}

const UNITS = ["B", "kB", "MB", "GB", "TB"];

export function size(bytes) {
  let unit = 0;
  while (bytes >= 999.5 && unit < UNITS.length - 1) {
    bytes /= 1000;
    unit += 1;
  }
  return `${bytes >= 9.95 || !unit ? bytes.toFixed(0) : bytes.toFixed(1)} ${UNITS[unit]}`;
}

export function share(part, whole) {
  return whole ? `${Math.round((100 * part) / whole)}%` : NOTHING;
}

export function count(number) {
  return number === null || number === undefined ? NOTHING : number.toLocaleString("en-US");
}

export function clock(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString([], { hourCycle: "h23" });
}

export function plural(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}
