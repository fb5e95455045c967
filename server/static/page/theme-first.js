// Runs before the first paint, so that a chosen theme does not flash: theme.js is a module and comes later.
const chosenTheme = localStorage.getItem("mixserve-theme");
if (chosenTheme === "light" || chosenTheme === "dark") document.documentElement.dataset.theme = chosenTheme;
