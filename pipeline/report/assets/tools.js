"use strict";
// Elements, visible text, formatted numbers. The files of the script share one scope, in the order of page.py.

const $ = (id) => document.getElementById(id);

/** An element with attributes (`class`, `aria-...`; null and false are left out) and children (nodes or text). */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== false));
  return node;
}

const memo = (make) => {
  const known = new Map();
  return (key) => {
    if (!known.has(key)) known.set(key, make(key));
    return known.get(key);
  };
};

const later = (milliseconds, action) => {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, milliseconds);
  };
};

function bytes(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}
const u16 = (base64) => new Uint16Array(bytes(base64).buffer);
const u32 = (base64) => new Uint32Array(bytes(base64).buffer);

const number = (value) => value.toLocaleString("en");
const fixed = (value, digits) => value.toFixed(digits).replace("-", "−");
const signed = (value, digits) => (value > 0 ? "+" : "") + fixed(value, digits);
const nats = (value) => (value === null ? "" : value.toFixed(3));
const percent = (p) => (p >= 0.9995 ? "100%" : p < 0.0005 ? "<0.1%" : `${(100 * p).toFixed(1)}%`);

// Control characters, characters that reorder or hide text, and lone surrogates: shown as escapes.
const UNSEEN = new RegExp(
  "([\\0-\\x1f\\x7f-\\x9f\\xad\\u061c\\u180e\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u2069\\ufeff\\ufff9-\\ufffb" +
    "\\u{e0000}-\\u{e007f}\\p{Surrogate}])",
  "u",
);
const hex = (letter) => {
  const code = letter.codePointAt(0);
  return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
};
const SIGNS = { "\n": "↵", "\t": "⇥", "\r": "␍" };

/** `text` as nodes: newlines break the line and have a sign, invisible characters are escapes. */
const visible = (text) =>
  text.split(UNSEEN).map((part, i) => {
    if (i % 2 === 0) return part;
    const sign = el("span", { class: "sign" }, SIGNS[part] ?? hex(part));
    if (part !== "\n") return sign;
    return el("span", {}, sign, part);
  });

/** `text` on one line. */
const line = (text) =>
  text
    .split(UNSEEN)
    .map((part, i) => (i % 2 ? (SIGNS[part] ?? hex(part)) : part))
    .join("");

/** A token's text on one line, with visible spaces. */
const label = (text) => (text === "" ? "(part of a character)" : line(text).replaceAll(" ", "␣"));

const RIGHT_TO_LEFT = /[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;
const direction = (text) => (RIGHT_TO_LEFT.test(/\p{L}/u.exec(text)?.[0] ?? "") ? "rtl" : "ltr");
