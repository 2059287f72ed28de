(() => {
  const rows = JSON.parse(document.getElementById("data").textContent);
  const size = 50, body = document.getElementById("body"), where = document.getElementById("where");
  const back = document.getElementById("back-button"), next = document.getElementById("next-button");
  if (rows.length <= size) return;
  document.querySelector(".pager").hidden = false;
  let page = 0;
  const show = () => {
    const from = page * size, shown = rows.slice(from, from + size);
    body.replaceChildren(...shown.map((cells) => {
      const row = document.createElement("tr");
      cells.forEach((cell, at) => {
        const td = row.insertCell();
        td.textContent = cell;
        if (at < 2) td.className = "long";
      });
      return row;
    }));
    where.textContent = `${from + 1} – ${from + shown.length} of ${rows.length}`;
    back.disabled = page === 0;
    next.disabled = from + size >= rows.length;
  };
  back.addEventListener("click", () => { page -= 1; show(); });
  next.addEventListener("click", () => { page += 1; show(); });
  show();
})();
