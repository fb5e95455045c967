// Light, dark, or as the system has it. The style sheets follow `data-theme`; canvases are told of a change.

const KEY = "mixserve-theme";
const NEXT = { auto: "light", light: "dark", dark: "auto" };
const GLYPH = { auto: "◐", light: "☀", dark: "☾" };

/** Makes `button` the switch. `changed` is called whenever the colours become other ones. */
export function switchTheme(button, changed) {
  const root = document.documentElement;
  const show = () => {
    const theme = root.dataset.theme ?? "auto";
    button.textContent = GLYPH[theme];
    button.setAttribute("aria-label", `Theme: ${theme}. Change to ${NEXT[theme]}`);
    button.title = `Theme: ${theme}`;
  };
  button.addEventListener("click", () => {
    const theme = NEXT[root.dataset.theme ?? "auto"];
    if (theme === "auto") {
      delete root.dataset.theme;
      localStorage.removeItem(KEY);
    } else {
      root.dataset.theme = theme;
      localStorage.setItem(KEY, theme);
    }
    show();
    changed();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  show();
}
