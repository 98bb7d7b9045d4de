"use strict";
// In the head, before anything is drawn: the reader's choice, else the system's.
const systemDark = matchMedia("(prefers-color-scheme: dark)");
function readTheme() {
  try { return localStorage.getItem("sparsekv-theme"); } catch { return null; } // some browsers keep none for files
}
function keepTheme(name) {
  try { localStorage.setItem("sparsekv-theme", name); } catch { /* then it lasts until the page is closed */ }
}
document.documentElement.dataset.theme = readTheme() || (systemDark.matches ? "dark" : "light");
