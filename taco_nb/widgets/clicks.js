// Tells the kernel which point of a plotly figure was clicked. The notebook draws the figure like any other, and the key in
// its layout tells which one is meant. A FigureWidget would do this too, but would put 5 MB of script into every notebook.

export default {
  render({ model }) {
    const heard = new WeakSet();
    const listen = () => {
      for (const plot of document.querySelectorAll(".js-plotly-plot")) {
        if (plot.layout?.meta?.key !== model.get("key") || heard.has(plot)) continue;
        heard.add(plot);
        plot.on("plotly_click", ({ points }) => {
          if (!points[0]?.customdata) return; // a curve through means is no image
          model.set("point", [...points[0].customdata, Date.now()]); // the time makes a second click on a point a change
          model.save_changes();
        });
      }
    };
    const timer = setInterval(listen, 500); // the notebook draws a figure when it likes, and may draw it again
    return () => clearInterval(timer);
  },
};
