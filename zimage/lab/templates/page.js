"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Figures come in neutral greys; here they take the page's own ink, in the scheme the reader has.
  function dressed(layout, width) {
    const result = structuredClone(layout);
    result.font = { ...result.font, color: css("--ink") };
    result.hoverlabel = { ...result.hoverlabel, bgcolor: css("--surface"), bordercolor: css("--line"),
                          font: { ...(result.hoverlabel || {}).font, color: css("--ink") } };
    for (const key of Object.keys(result)) {
      if (/^[xy]axis\d*$/.test(key)) {
        result[key].gridcolor = css("--grid");
        if (/^x/.test(key) && width < 480) result[key].nticks = Math.min(result[key].nticks || 4, 4);
        if (/^x/.test(key)) result[key].tickfont = { ...result[key].tickfont, color: css("--ink-2") };
      }
    }
    return result;
  }

  // A chart whose layout says at which place of a point's data a link lies has points that lead there: files beside
  // the page, never another scheme.
  function follow(plot, place) {
    plot.on("plotly_click", (event) => {
      const link = event.points.map((point) => (point.customdata || [])[place]).find((one) => one);
      if (link && !link.includes(":")) window.location.href = link;
    });
  }

  function draw(plot) {
    const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    const options = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };
    plot.dataset.drawn = "begun";
    for (const trace of figure.data) {
      if (trace.type === "bar" && trace.error_x) trace.error_x.color = css("--ink");
    }
    window.Plotly.react(plot, figure.data, dressed(figure.layout, plot.clientWidth), options).then(() => {
      const place = (figure.layout.meta || {}).link;
      if (place !== undefined && !plot.dataset.linked) { plot.dataset.linked = "yes"; follow(plot, place); }
      plot.dataset.drawn = "yes";
    });
  }

  // What lies in a closed <details> has a box and yet cannot be seen, nor measured.
  const visible = (plot) => plot.checkVisibility ? plot.checkVisibility() : plot.getClientRects().length > 0;
  function drawVisible() {
    if (!window.Plotly) {
      for (const plot of document.querySelectorAll(".plot")) {
        plot.textContent = "The chart's script, assets/plotly.min.js, is not where this page expects it.";
      }
      return;
    }
    for (const plot of document.querySelectorAll(".plot")) {
      if (!visible(plot)) continue;
      if (plot.dataset.drawn === "yes") window.Plotly.Plots.resize(plot);
      else if (!plot.dataset.drawn) draw(plot);
    }
  }

  for (const select of document.querySelectorAll("select[data-cases]")) {
    const show = () => {
      for (const part of document.getElementById(select.dataset.cases).querySelectorAll(".case")) {
        part.hidden = part.id !== select.value;
      }
      drawVisible();
    };
    select.addEventListener("change", show);
    show();
  }
  document.addEventListener("toggle", drawVisible, true);
  dark.addEventListener("change", () => {
    for (const plot of document.querySelectorAll(".plot[data-drawn]")) draw(plot);
  });
  drawVisible();
})();
