"use strict";
const { charts, microscope, colours } = JSON.parse(document.getElementById("data").textContent);

for (const [name, spec] of Object.entries(charts)) {
  vegaEmbed(document.getElementById(name), spec, { mode: "vega-lite", renderer: "svg", actions: false }).catch(console.error);
}

// Whatever comes from a run or a text is set as text, never as markup.
function element(tag, text, ...children) {
  const made = document.createElement(tag);
  made.textContent = text;
  made.append(...children);
  return made;
}

function row(...cells) {
  return element("tr", "", ...cells.map((cell) => element("td", "", cell)));
}

const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");

if (microscope) {
  const [layer, expert, text] = ["layer", "expert", "text"].map((id) => document.getElementById(id));
  const tokens = [...text.children], strings = tokens.map((token) => token.textContent);
  let chosen = 0;

  function showLayer() {
    document.getElementById("layer-number").value = layer.value;
    tokens.forEach((token, at) => {
      const first = microscope.picks[layer.value][at][0];
      token.style.setProperty("--colour", colours[first % colours.length]);
      token.dataset.expert = first;
    });
    showToken();
    showLikes();
  }

  function showToken() {
    const picks = microscope.picks[layer.value][chosen], top = microscope.top[layer.value][chosen];
    const table = element("table", "");
    for (let at = 0; at < top.length; at += 2) {
      const bar = element("span", "");
      bar.className = "bar";
      bar.style.width = `${top[at + 1] / 12}px`;
      const name = element(picks.includes(top[at]) ? "strong" : "span", `expert ${top[at]}`);
      table.append(row(name, (top[at + 1] / 1000).toFixed(3), bar));
    }
    const title = element("p", `Token ${chosen}, layer ${layer.value}: `, element("code", visible(strings[chosen])));
    document.getElementById("token").replaceChildren(title, table, element("p", `goes to expert ${picks.join(" and ")}`));
  }

  function choose(at) {
    tokens[chosen].tabIndex = -1;
    chosen = at;
    tokens[at].tabIndex = 0;
    showToken();
  }

  function showLikes() {
    const likes = microscope.likes[layer.value][expert.value];
    const list = (title, pairs, unit) => {
      const table = element("table", "");
      pairs.forEach(([name, value]) => table.append(row(element("code", visible(microscope.names[name])), `${value}${unit}`)));
      return element("div", "", element("h4", title), pairs.length ? table : element("p", "none"));
    };
    document.getElementById("likes").replaceChildren(
      list(`Most frequent of its ${likes.picks} tokens`, likes.frequent, ""),
      list("Most specific", likes.specific, "%"),
    );
  }

  layer.addEventListener("input", showLayer);
  expert.addEventListener("input", showLikes);
  text.addEventListener("mouseover", (event) => { if (event.target !== text) choose(tokens.indexOf(event.target)); });
  text.addEventListener("focusin", (event) => choose(tokens.indexOf(event.target)));
  text.addEventListener("keydown", (event) => {
    const aside = { ArrowLeft: -1, ArrowRight: 1 }[event.key], up = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (aside) tokens[Math.min(tokens.length - 1, Math.max(0, chosen + aside))].focus();
    else if (up) { layer.valueAsNumber += up; showLayer(); }
    else if (event.key === "Enter") { expert.value = microscope.picks[layer.value][chosen][0]; showLikes(); }
    else return;
    event.preventDefault();
  });
  showLayer();
}
