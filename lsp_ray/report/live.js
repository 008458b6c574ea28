async function refresh() {
  try {
    const answer = await fetch(location.href);
    if (!answer.ok) throw new Error(answer.statusText);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.querySelector("main").replaceWith(page.querySelector("main"));
  } catch {
    document.querySelector(".status").textContent = "The run has ended, or cannot be reached: this is its last page.";
  }
}
setInterval(refresh, 5000);
