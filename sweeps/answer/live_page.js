  // The page asks whether the study has changed, and then replaces the sections that have. Scroll
  // positions, sorted tables, opened details, and zoom and filters of charts stay as they are.
  const POLL_MILLISECONDS = 2000;
  const received = new Map();  // each section's HTML as it came, by its id
  const lost = document.getElementById("lost");
  let isAsking = false;

  // Plotly keeps what the reader has changed in a chart as long as `uirevision` is the same.
  const drawChart = (chart, data, layout, config) => Plotly.react(chart, data, {...layout, uirevision: 1}, config);
  for (const chart of document.querySelectorAll(".js-plotly-plot")) {
    drawChart(chart, chart.data, chart.layout, chart._context);
  }
  Plotly.newPlot = drawChart;

  const remember = section => ({
    opened: [...section.querySelectorAll("details")].map(details => details.open),
    scrolled: [...section.querySelectorAll(".scroll, .chart")].map(box => [box.scrollLeft, box.scrollTop]),
    sorted: [...section.querySelectorAll("table.sortable")].map(table => table.querySelector("th[aria-sort]")),
  });

  const restore = (section, state) => {
    section.querySelectorAll("details").forEach((details, index) => { details.open = state.opened[index] || false; });
    section.querySelectorAll("table.sortable").forEach((table, index) => {
      const head = state.sorted[index];
      const column = head ? [...table.querySelectorAll("th")].findIndex(other => other.textContent === head.textContent) : -1;
      if (column >= 0) sort(table, column, head.getAttribute("aria-sort") === "ascending");
    });
    section.querySelectorAll(".scroll, .chart").forEach((box, index) => {
      if (state.scrolled[index]) [box.scrollLeft, box.scrollTop] = state.scrolled[index];
    });
  };

  const runScripts = section => {
    for (const inert of section.querySelectorAll("script")) {
      const script = document.createElement("script");
      script.textContent = inert.textContent;
      inert.replaceWith(script);
    }
  };

  const replaceSection = (old, fresh) => {
    const state = remember(old);
    // The charts' own elements stay, and are drawn again with the new data.
    for (const chart of fresh.querySelectorAll(".plotly-graph-div")) {
      const drawn = old.querySelector(`#${chart.id}`);
      if (drawn) chart.replaceWith(drawn);
    }
    old.replaceWith(fresh);
    runScripts(fresh);
    restore(fresh, state);
  };

  const replaceSections = page => {
    const main = document.querySelector("main");
    const fresh = [...page.querySelectorAll("main > section")];
    const ids = fresh.map(section => section.id);
    for (const old of [...main.children]) {
      if (!ids.includes(old.id)) old.remove();
    }
    fresh.forEach((section, position) => {
      const html = section.outerHTML, old = document.getElementById(section.id);
      if (old && received.get(section.id) === html) return;
      received.set(section.id, html);
      if (old) return replaceSection(old, document.adoptNode(section));
      main.insertBefore(document.adoptNode(section), main.children[position] || null);
      runScripts(section);
    });
  };

  const replacePage = page => {
    // What is read stays where it is, though sections above it may grow.
    const anchor = [...document.querySelectorAll("main > section")].find(section => section.getBoundingClientRect().bottom > 60);
    const before = anchor && anchor.getBoundingClientRect().top, isAtTop = scrollY === 0;
    document.querySelector("header").innerHTML = page.querySelector("header").innerHTML;
    const links = [...page.querySelectorAll("nav a")].map(link => document.adoptNode(link));
    document.querySelectorAll("nav a").forEach(link => link.remove());
    document.querySelector("nav details").append(...links);
    replaceSections(page);
    document.body.dataset.version = page.body.dataset.version;
    const same = anchor && document.getElementById(anchor.id);
    if (same && !isAtTop) scrollBy({top: same.getBoundingClientRect().top - before, behavior: "instant"});
  };

  const read = async address => {
    const answer = await fetch(address), text = await answer.text();
    if (!answer.ok) throw new Error(text);  // the study's folder or database is out of reach
    return text;
  };

  const ask = async () => {
    if (isAsking || document.hidden) return;
    isAsking = true;
    try {
      const version = await read("version");
      if (version !== document.body.dataset.version) {
        replacePage(new DOMParser().parseFromString(await read("./"), "text/html"));
      }
      lost.hidden = true;
    } catch (error) {
      // Without a connection it is a TypeError.
      lost.textContent = error instanceof TypeError ? "not connected: python -m sweeps watch has ended" : `not read: ${error.message}`;
      lost.hidden = false;
    }
    isAsking = false;
  };
  setInterval(ask, POLL_MILLISECONDS);
  document.addEventListener("visibilitychange", ask);
