const { header, steps } = JSON.parse(document.getElementById("recording").textContent);
const viewer = diffusionViewer(document.getElementById("viewer"), header);
steps.forEach(viewer.add);
document.addEventListener("keydown", viewer.key);
