// Every text that is shown within some elements, with how well it stands out: the contrast ratio of WCAG 2, 1 to 21.
(within) => {
  const channels = (colour) => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
    return { rgb: [red, green, blue], alpha: alpha / 255 };
  };
  const over = (front, alpha, behind) => front.map((value, place) => alpha * value + (1 - alpha) * behind[place]);
  // What lies behind an element: the backgrounds of all that it stands in, the innermost on top.
  const ground = (element) => {
    if (element === null) return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
    const { rgb, alpha } = channels(getComputedStyle(element).backgroundColor);
    return alpha === 1 ? rgb : over(rgb, alpha, ground(element.parentElement));
  };
  const luminance = (rgb) => {
    const [red, green, blue] = rgb.map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const contrast = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node !== null; node = walker.nextNode()) {
    const element = node.parentElement, text = node.textContent.trim();
    // In the cells of a heat map Plotly chooses black or white itself, by the colour of each.
    if (text === "" || !element.closest(within) || element.closest("script, style, noscript, .heatmap-label")) continue;
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    // What Plotly says of a point stands in a box of its own.
    const box = element.closest(".hovertext")?.querySelector("path");
    const behind = box ? channels(getComputedStyle(box).fill).rgb : ground(element);
    const style = getComputedStyle(element);
    const inside = element.closest("svg") === null ? style.color : style.fill;
    const { rgb, alpha } = channels(inside);
    texts.push({ text: text.slice(0, 80), contrast: contrast(over(rgb, alpha, behind), behind), colour: inside });
  }
  return texts;
}
