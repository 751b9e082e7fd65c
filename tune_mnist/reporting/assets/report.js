// Draws the page's charts in the theme that the reader's system asks for, and again when it changes.
const places = [...document.querySelectorAll(".chart")];
const charts = places.map((place) => JSON.parse(place.nextElementSibling.textContent));
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 640px)");

function theme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = {
    gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"),
    automargin: true, title: { standoff: 8 },
  };
  const family = getComputedStyle(document.body).fontFamily;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), family, size: 12 },
    xaxis: axis, yaxis: axis, polar: {},
    hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"),
      font: { color: colour("--ink") }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--line"), activecolor: colour("--soft") },
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" },
    margin: { l: 8, r: 12, t: 34, b: 8 },
    // A finger that scrolls the page must not zoom a chart.
    dragmode: narrow.matches ? false : "zoom",
  };
}

function draw(method) {
  const layout = theme();
  places.forEach((place, position) => {
    const chart = charts[position];
    const whole = { ...chart.layout, template: { layout } };
    // A copy, because plotly writes into its data.
    const data = structuredClone(chart.data);
    Plotly[method](place, data, whole, {
      responsive: true, displaylogo: false, displayModeBar: narrow.matches || chart.layout.height < 300 ? false : "hover",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    });
  });
}

draw("newPlot");
dark.addEventListener("change", () => draw("react"));
