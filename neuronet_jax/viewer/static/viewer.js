// The page of `neuronet view`: one head at a time, one label map over it, and a note. Its addresses are relative, below the
// secret that the server's own address holds.
"use strict";
(async () => {
  const part = (name) => document.getElementById(name);
  const say = (error) => { part("message").textContent = error ? String(error.message || error) : ""; };
  const ask = async (address, note) => {
    const options = note && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(note) };
    const answer = await fetch(address, options);
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  };
  const { scans, tables, notes: known, verdicts } = await ask("catalogue.json");
  let notes = known, number = 0, shown = null, loading = Promise.resolve();

  const niivue = new window.niivue.Niivue({
    backColor: [0, 0, 0, 1], isColorbar: false, dragAndDropEnabled: false, show3Dcrosshair: true, crosshairWidthUnit: "mm", crosshairWidth: 0.8,
    multiplanarPadPixels: 16, showAllOrientationMarkers: true, fontColor: [1, 0.88, 0.54, 1],  // as on the report pages
  });
  await niivue.attachToCanvas(part("canvas"));
  niivue.setRadiologicalConvention(false);  // left on the left, as on the report pages
  niivue.setInterpolation(true);  // labels have no values between
  const views = { multi: "sliceTypeMultiplanar", axial: "sliceTypeAxial", coronal: "sliceTypeCoronal", sagittal: "sliceTypeSagittal", render: "sliceTypeRender" };

  const chosen = () => scans[number].maps[part("map").selectedIndex];
  const nameOf = (map, value) => {
    const table = tables[map.table];
    const row = table ? table.I.indexOf(Math.round(value)) : -1;
    return row < 0 ? `${map.title} ${value.toFixed(3)}` : `${table.labels[row]} (${map.title} ${table.I[row]})`;
  };
  niivue.onLocationChange = (place) => {
    const map = chosen();
    const value = place.values.length ? place.values[place.values.length - 1].value : NaN;
    const [x, y, z] = place.mm;
    part("structure").textContent = `${map ? nameOf(map, value) : ""}   x ${x.toFixed(0)}  y ${y.toFixed(0)}  z ${z.toFixed(0)} mm`;
  };

  const showNote = () => {
    const note = notes[scans[number].name] || {};
    for (const button of part("verdicts").children) button.setAttribute("aria-pressed", button.value === (note.verdict || ""));
    part("remark").value = note.remark || "";
    part("saved").textContent = `${Object.keys(notes).length} of ${scans.length} with a note`;
  };
  const save = async (verdict) => {
    try {
      notes = await ask("notes", { scan: scans[number].name, verdict, remark: part("remark").value });
      showNote();
      part("saved").textContent += ", saved in qc.tsv";
      say("");
    } catch (error) { say(error); }
  };
  const verdict = () => ([...part("verdicts").children].find((b) => b.getAttribute("aria-pressed") === "true") || { value: "" }).value;

  const middle = ({ img, hdr: { affine, dims: [, width, height] } }) => {  // of what is labelled, in mm
    let count = 0, sums = [0, 0, 0];
    for (let voxel = 0; voxel < img.length; voxel += 7) {  // some of them tell as much as all
      if (!img[voxel]) continue;
      count += 1;
      [voxel % width, Math.floor(voxel / width) % height, Math.floor(voxel / width / height)].forEach((at, axis) => { sums[axis] += at; });
    }
    return count && affine.slice(0, 3).map((row) => row[3] + row.slice(0, 3).reduce((mm, step, axis) => mm + step * sums[axis] / count, 0));
  };

  const draw = async () => {  // the scan below, the chosen map above; without the scan, the map alone
    const scan = scans[number], map = chosen();
    document.body.dataset.state = "loading";
    const volumes = scan.image ? [{ url: scan.image, colormap: "gray" }] : [];
    if (map) volumes.push({ url: map.file, opacity: scan.image ? Number(part("opacity").value) : 1 });
    await niivue.loadVolumes(volumes);
    const labels = niivue.volumes[niivue.volumes.length - 1];
    if (map && tables[map.table]) labels.setColormapLabel(tables[map.table]);
    else if (map) labels.colormap = "warm";
    niivue.updateGLVolume();
    const start = map && shown !== scan && middle(labels);
    if (start) niivue.scene.crosshairPos = niivue.mm2frac(start);
    shown = scan;
    niivue.setSliceType(niivue[views[part("view").value]]);
    niivue.createOnLocationChange();
    say(scan.image ? "" : "To see the scan too, start the viewer with it: neuronet view OUT SCAN");
    document.body.dataset.state = `${scan.name} ${map ? map.title : ""}`;
  };
  const redraw = () => { loading = loading.then(draw).catch((error) => { document.body.dataset.state = "failed"; say(error); }); };

  const go = (to) => {
    number = (to + scans.length) % scans.length;
    const scan = scans[number], before = part("map").value;
    part("scan").selectedIndex = number;
    part("map").replaceChildren(...scan.maps.map((map) => new Option(map.title, map.title)));
    if (scan.maps.some((map) => map.title === before)) part("map").value = before;
    part("page").hidden = !scan.page;
    if (scan.page) part("page").href = scan.page;
    const dice = scan.predicted_dice === "n/a" ? "" : `predicted Dice ${Number(scan.predicted_dice).toFixed(3)}`;
    part("facts").textContent = [`${number + 1} of ${scans.length}`, dice, scan.warnings.replaceAll(",", ", ")].filter(Boolean).join(", ");
    showNote();
    redraw();
  };

  part("scan").replaceChildren(...scans.map((scan) => new Option(scan.name, scan.name)));
  part("verdicts").replaceChildren(...verdicts.map((value) => {
    const button = document.createElement("button");
    Object.assign(button, { value, textContent: value, title: `${value} (${value[0]})` });
    button.addEventListener("click", () => save(button.getAttribute("aria-pressed") === "true" ? "" : value));
    return button;
  }));
  part("scan").addEventListener("change", () => go(part("scan").selectedIndex));
  part("next").addEventListener("click", () => go(number + 1));
  part("back").addEventListener("click", () => go(number - 1));
  part("map").addEventListener("change", redraw);
  part("view").addEventListener("change", () => niivue.setSliceType(niivue[views[part("view").value]]));
  part("opacity").addEventListener("input", () => {
    if (niivue.volumes.length > 1) niivue.setOpacity(niivue.volumes.length - 1, Number(part("opacity").value));
  });
  part("remark").addEventListener("change", () => save(verdict()));
  document.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT"].includes(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
    const value = verdicts.find((one) => one[0] === event.key);
    if (event.key === "n") go(number + 1);
    else if (event.key === "p") go(number - 1);
    else if (value) save(value);
  });
  go(0);
})().catch((error) => { document.body.dataset.state = "failed"; document.getElementById("message").textContent = String(error); });
