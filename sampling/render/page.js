const { header, steps } = JSON.parse(document.getElementById("recording").textContent);
const root = document.getElementById("viewer");
root.replaceChildren();
const viewer = diffusionViewer(root, header);
diffusionLegend(root, root);
viewer.add(...steps);
document.addEventListener("keydown", viewer.key);
