// How does the page change? In place: what has the focus keeps it, what did not change is not touched.

export function el(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [property, value] of Object.entries(properties)) {
    if (property.includes("-") || property === "scope") element.setAttribute(property, value);
    else element[property] = value;
  }
  element.append(...children);
  return element;
}

export function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

// One element in `container` for each item, in their order; those of items that are gone go.
export function each(container, items, key, make, update) {
  const before = new Map([...container.children].map((child) => [child.dataset.key, child]));
  let place = container.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let child = before.get(name);
    if (child === undefined) {
      child = make(item);
      child.dataset.key = name;
    }
    before.delete(name);
    if (child === place) place = place.nextElementSibling;
    else container.insertBefore(child, place);
    update(child, item);
  }
  for (const child of before.values()) child.remove();
}
