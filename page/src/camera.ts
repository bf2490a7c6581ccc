/** Zoom and pan: a point (x, y) of the graph is drawn at (k x + dx, k y + dy). */

export interface Camera {
  k: number;
  dx: number;
  dy: number;
}

export interface Size {
  width: number;
  height: number;
}

/** Space around the graph for the names of layers and tokens. */
export const INSET = { left: 54, right: 16, top: 10, bottom: 12 };

const SMALLEST = 0.08;
const LARGEST = 6;

/** The camera that shows everything: never larger than `largest`, never too small to read. */
export function fit(content: Size, frame: Size, largest = 1.2, smallest = 0.34): Camera {
  const width = Math.max(1, frame.width - INSET.left - INSET.right);
  const height = Math.max(1, frame.height - INSET.top - INSET.bottom);
  const k = Math.max(smallest, Math.min(largest, width / content.width, height / content.height));
  const spareX = width - content.width * k;
  const spareY = height - content.height * k;
  return {
    k,
    dx: INSET.left + (spareX >= 0 ? spareX / 2 : spareX),
    dy: INSET.top + (spareY >= 0 ? spareY / 2 : 0),
  };
}

export function zoomed(camera: Camera, factor: number, x: number, y: number): Camera {
  const k = Math.min(LARGEST, Math.max(SMALLEST, camera.k * factor));
  const ratio = k / camera.k;
  return { k, dx: x - (x - camera.dx) * ratio, dy: y - (y - camera.dy) * ratio };
}

export function panned(camera: Camera, dx: number, dy: number): Camera {
  return { k: camera.k, dx: camera.dx + dx, dy: camera.dy + dy };
}

/** Keep a strip of the graph within the frame, so that it cannot be lost. */
export function clamped(camera: Camera, content: Size, frame: Size): Camera {
  const margin = 80;
  const dx = Math.min(frame.width - margin, Math.max(margin - content.width * camera.k, camera.dx));
  const dy = Math.min(frame.height - margin, Math.max(margin - content.height * camera.k, camera.dy));
  return { k: camera.k, dx, dy };
}

/** The camera moved as little as needed to show a point with some space around it. */
export function revealing(camera: Camera, x: number, y: number, frame: Size): Camera {
  const px = camera.k * x + camera.dx;
  const py = camera.k * y + camera.dy;
  const inside = (value: number, low: number, high: number): number => Math.min(high, Math.max(low, value));
  const moveX = inside(px, INSET.left + 60, Math.max(INSET.left + 60, frame.width - 80)) - px;
  const moveY = inside(py, 40, Math.max(40, frame.height - 50)) - py;
  return panned(camera, moveX, moveY);
}
