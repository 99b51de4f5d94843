// The keyboard, and protection from double clicks. Without this script every form still works.
"use strict";

(function () {
  const typing = (node) => node && (node.tagName === "TEXTAREA" ||
    (node.tagName === "INPUT" && !["radio", "checkbox"].includes(node.type)));
  const openAside = () => document.querySelector("details.aside[data-aside][open]");
  const rating = document.querySelector("form[data-rating]");
  const ranking = document.querySelector("form[data-ranking]");

  // A form is sent once: the second click of a double click finds it busy.
  for (const form of document.querySelectorAll("form[data-once]")) {
    form.addEventListener("submit", (event) => {
      if (form.dataset.sent) { event.preventDefault(); return; }
      form.dataset.sent = "yes";
      document.body.classList.add("busy");
    });
  }
  // Back from another page, with the forms as they were left.
  window.addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

  // Criteria are rated one after the other; the one whose turn it is is marked.
  function currentCriterion() {
    const rows = [...rating.querySelectorAll(".criterion")];
    return rows.find((row) => !row.querySelector("input:checked")) || rows[rows.length - 1];
  }
  function markCriterion() {
    for (const row of rating.querySelectorAll(".criterion")) row.classList.remove("current");
    currentCriterion().classList.add("current");
  }
  if (rating) { rating.addEventListener("change", markCriterion); markCriterion(); }

  // A place is free until a text has it.
  function rank(digit) {
    const places = [...ranking.querySelectorAll("select")];
    const chosen = places[digit - 1];
    if (!chosen || chosen.value) return;
    chosen.value = String(places.filter((place) => place.value).length + 1);
    const open = places.filter((place) => !place.value);
    if (open.length === 1) open[0].value = String(places.length);
  }

  function digitPressed(digit) {
    const aside = openAside();
    if (aside) {
      const choice = aside.querySelector(`[data-digit="${digit}"]`);
      if (choice) { choice.checked = true; choice.focus(); }
      return true;
    }
    if (rating && digit >= 1 && digit <= 5) {
      const choice = currentCriterion().querySelector(`input[value="${digit}"]`);
      choice.checked = true;
      markCriterion();
      return true;
    }
    if (ranking && digit >= 1) { rank(digit); return true; }
    return false;
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat) return;
    const aside = openAside();
    if (event.key === "Escape") {
      if (aside) { aside.open = false; aside.querySelector("summary").focus(); }
      return;
    }
    if (typing(event.target)) return;
    if (/^[0-9]$/.test(event.key) && digitPressed(Number(event.key))) {
      event.preventDefault();
      return;
    }
    if (event.key === "Enter" && aside && aside.contains(event.target) &&
        event.target.tagName === "INPUT") {
      event.preventDefault();
      aside.querySelector("form").requestSubmit();
      return;
    }
    if (event.key === "Backspace" && ranking) {
      for (const place of ranking.querySelectorAll("select")) place.value = "";
      event.preventDefault();
      return;
    }
    // Enter on a link or button of the page is that link or button.
    if (event.key === "Enter" && event.target.closest("a, button, summary")) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const target = document.querySelector(`[data-key="${CSS.escape(key)}"]`);
    if (!target || (aside && !aside.contains(target))) return;
    event.preventDefault();
    if (target.tagName === "SUMMARY") {
      const details = target.parentElement;
      details.open = !details.open;
      const first = details.querySelector("input[type=radio]");
      if (details.open && first) first.focus();
    } else {
      target.click();
    }
  });

  // One panel at a time.
  for (const details of document.querySelectorAll("details.aside")) {
    details.addEventListener("toggle", () => {
      if (!details.open) return;
      for (const other of document.querySelectorAll("details.aside[open]")) {
        if (other !== details) other.open = false;
      }
      details.scrollIntoView({ block: "nearest" });
    });
  }

  const copy = document.querySelector("[data-copy]");
  if (copy) copy.addEventListener("click", () => {
    const field = document.querySelector(copy.dataset.copy);
    field.select();
    navigator.clipboard.writeText(field.value);
  });
})();
