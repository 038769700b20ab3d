// docs/zoo: the table of the page becomes one that sorts and filters, and a plot shows the rows that are left.
"use strict";

(() => {
  const written = document.querySelector(".zoo table");
  const number = (text) => (text === "" ? null : Number(text.replaceAll(",", "")));
  const rows = [...written.tBodies[0].rows].map(({ cells }) => ({
    checkpoint: cells[0].innerHTML,
    name: cells[0].innerText.trim(),
    dataset: cells[1].innerText.trim(),
    bits: cells[2].innerText.trim(),
    accuracy: number(cells[3].innerText.trim()),
    bytes: number(cells[4].innerText.trim()),
    macs: number(cells[5].innerText.trim()),
    latency: number(cells[6].innerText.trim()),
    from: cells[7].innerHTML,
    python: cells[8].innerHTML,
  }));

  const width = (bits) => (bits === "float" ? 32 : Number(bits.split("/")[0]));
  const grouped = (cell) => cell.getValue()?.toLocaleString("en") ?? "";
  const fixed = (cell) => cell.getValue()?.toFixed(2) ?? "";
  const chosen = { headerFilter: "list", headerFilterParams: { valuesLookup: true, clearable: true } };
  const limit = (sign) => ({
    sorter: "number",
    sorterParams: { alignEmptyValues: "bottom" },
    hozAlign: "right",
    headerFilter: "number",
    headerFilterPlaceholder: sign === ">=" ? "at least" : "at most",
    headerFilterFunc: (wanted, value) =>
      value !== null && (sign === ">=" ? value >= Number(wanted) : value <= Number(wanted)),
  });

  const place = document.createElement("div");
  written.closest(".table-wrapper, table").replaceWith(place);
  const table = new Tabulator(place, {
    data: rows,
    layout: "fitDataFill",
    columns: [
      { title: "checkpoint", field: "checkpoint", formatter: "html", headerFilter: "input", headerFilterPlaceholder: "part of a name",
        sorter: (a, b, first, second) => first.getData().name.localeCompare(second.getData().name),
        headerFilterFunc: (wanted, _, row) => row.name.includes(wanted) },
      { title: "dataset", field: "dataset", ...chosen },
      { title: "bits", field: "bits", sorter: (a, b) => width(a) - width(b), ...chosen },
      { title: "accuracy, %", field: "accuracy", formatter: fixed, ...limit(">=") },
      { title: "bytes", field: "bytes", formatter: grouped, ...limit("<=") },
      { title: "MACs", field: "macs", formatter: grouped, ...limit("<=") },
      { title: "latency, ms", field: "latency", formatter: fixed, ...limit("<=") },
      { title: "from", field: "from", formatter: "html", headerSort: false },
      { title: "Python", field: "python", formatter: "html", headerSort: false },
    ],
  });

  const frame = document.createElement("div");
  frame.className = "zoo-plot";
  frame.append(document.createElement("canvas"));
  place.after(frame);
  const colours = { mnist: "#0b8043", fashion_mnist: "#b8860b", cifar10: "#1a73e8", cifar100: "#c5221f" };
  const shapes = { float: "circle", "8/8": "rect", "4/4": "triangle", "2/2": "rectRot", "1/1": "star" };
  const datasets = [...new Set(rows.map((row) => row.dataset))];
  const colourOf = (name) => getComputedStyle(document.body).getPropertyValue(name);

  const megabytes = (bytes) => (/^[125]0*$/.test(String(bytes)) ? bytes / 1e6 : "");

  const plot = new Chart(frame.firstChild, {
    type: "scatter",
    data: { datasets: [] },
    options: {
      maintainAspectRatio: false,
      animation: false,
      scales: {
        x: { type: "logarithmic", title: { display: true, text: "weights, MB" }, ticks: { maxRotation: 0, callback: megabytes } },
        y: { title: { display: true, text: "accuracy, %" } },
      },
      plugins: {
        legend: { labels: { usePointStyle: true, pointStyle: "circle" } },
        tooltip: {
          callbacks: {
            label: ({ raw }) => `${raw.name}: ${raw.y.toFixed(2)} %, ${raw.x.toLocaleString("en")} bytes`,
          },
        },
      },
    },
  });

  const draw = (shown) => {
    const points = (dataset) => shown.filter((row) => row.dataset === dataset).map((row) => ({ ...row, x: row.bytes, y: row.accuracy }));
    plot.data.datasets = datasets.map((dataset) => ({
      label: dataset,
      data: points(dataset),
      backgroundColor: colours[dataset] ?? "#777",
      pointStyle: points(dataset).map((row) => shapes[row.bits] ?? "circle"),
      pointRadius: 6,
      pointHoverRadius: 9,
    }));
    const text = colourOf("--color-foreground-primary");
    plot.options.color = text;
    for (const axis of Object.values(plot.options.scales)) {
      axis.ticks = { ...axis.ticks, color: text };
      axis.title.color = text;
      axis.grid = { color: colourOf("--color-background-border") };
    }
    plot.update();
  };
  table.on("dataFiltered", (_, left) => draw(left.map((row) => row.getData())));
  table.on("tableBuilt", () => draw(rows));
  new MutationObserver(() => draw(table.getData("active"))).observe(document.body, { attributeFilter: ["data-theme"] });
  window.zoo = { table, plot };
})();
