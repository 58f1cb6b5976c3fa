// Where does everything come from? The API beside this page; an API key is kept in this tab alone.

const KEPT = "pdtasks-key";
const ANSWER_MS = 10000;

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  if (key) sessionStorage.setItem(KEPT, key);
  else sessionStorage.removeItem(KEPT);
}

export function hasKey() {
  return sessionStorage.getItem(KEPT) !== null;
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEPT);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { cache: "no-store", ...options, headers, signal: AbortSignal.timeout(ANSWER_MS) });
  if (response.ok) return response.json();
  const told = await response.json().catch(() => null);
  throw new Refused(response.status, told?.error?.message ?? `the API answers ${response.status}`);
}

export const overview = (limit) => ask(`pdtasks/overview?limit=${limit}`);
export const report = (id) => ask(`pdtasks/requests/${encodeURIComponent(id)}`);
export const drain = (worker) => ask(`pdtasks/workers/${encodeURIComponent(worker)}/drain`, { method: "POST" });
export const changeRole = (worker, role) =>
  ask(`pdtasks/workers/${encodeURIComponent(worker)}/role`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ role }),
  });
