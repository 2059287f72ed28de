(function () {
  "use strict";
  var stops = JSON.parse(document.getElementById("stops").textContent);
  var slider = document.getElementById("slider");
  var play = document.getElementById("play");
  var images = document.querySelectorAll("img[data-guess]");
  var charts = document.querySelectorAll("svg.chart");
  var at = { evaluations: null, objective: null, mse: null };
  Object.keys(at).forEach(function (key) { at[key] = document.getElementById("at-" + key); });
  var timer = null;

  function show(i) {
    var stop = stops[i];
    images.forEach(function (image) { image.src = stop.images[Number(image.dataset.guess)]; });
    Object.keys(at).forEach(function (key) { if (at[key]) { at[key].textContent = stop[key]; } });
    slider.setAttribute("aria-valuetext", stop.evaluations + " evaluations, objective " + stop.objective +
      (stop.mse ? ", mean squared error " + stop.mse : ""));
    charts.forEach(function (chart) {
      var d = chart.dataset;
      var along = d.log === "1" ? Math.log1p : Number;
      var share = (along(stop.x) - along(Number(d.min))) / (along(Number(d.max)) - along(Number(d.min)));
      var x = Number(d.left) + Math.min(Math.max(share, 0), 1) * (Number(d.right) - Number(d.left));
      var marker = chart.querySelector(".marker");
      marker.setAttribute("x1", x);
      marker.setAttribute("x2", x);
    });
  }

  function halt() {
    window.clearInterval(timer);
    timer = null;
    play.classList.remove("playing");
    play.setAttribute("aria-label", "Play the reconstruction from the start");
  }

  slider.addEventListener("input", function () { halt(); show(Number(slider.value)); });
  play.addEventListener("click", function () {
    if (timer !== null) { halt(); return; }
    var i = Number(slider.value) >= stops.length - 1 ? 0 : Number(slider.value);
    play.classList.add("playing");
    play.setAttribute("aria-label", "Pause");
    timer = window.setInterval(function () {
      slider.value = String(i);
      show(i);
      if (i >= stops.length - 1) { halt(); }
      i += 1;
    }, Math.max(40, 5000 / stops.length));
  });
  document.querySelector(".player").hidden = false;
  show(Number(slider.value));
})();
