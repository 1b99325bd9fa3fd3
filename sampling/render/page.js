const { header, steps } = JSON.parse(document.getElementById("recording").textContent);
const root = document.getElementById("viewer");
root.replaceChildren();
const viewer = diffusionViewer(root, header);
diffusionLegend(root);
viewer.add(...steps);
viewer.end();
document.addEventListener("keydown", viewer.key);
