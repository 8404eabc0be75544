
"use strict";

const $ = (id) => document.getElementById(id);

// Text from the server enters the document here alone, and only as text.
function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Relative to where the page is, a proxy's prefix included; an address with credentials in it cannot be asked.
const address = (path) => new URL(path, location.href);

// What the server says of a refusal, as one line.
async function refusal(response) {
  if (response.status === 401) return "the API key is refused; reload the page to be asked for it";
  let text = "";
  try {
    const body = await response.json();
    text = typeof body.error === "string" ? body.error : (body.error || body).message;
  } catch { /* not JSON: the status alone says it */ }
  return text || `the server answered HTTP ${response.status}`;
}

function shown(number, digits) {
  return Number.isFinite(number) ? number.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: Math.min(digits, number < 100 ? digits : 0) }) : "–";
}
