/**
 * The picture at rest: all edges and nodes on one canvas that is larger than its frame. A pan or a zoom moves the
 * finished picture; it is drawn anew, in slices of some milliseconds, once the camera rests.
 */

import type { Camera, Size } from "./camera";
import { paintEdges, paintGround, paintNodes, type Scene } from "./paint";

const MARGIN = 0.25; // of the frame on every side
const SLICE = 400; // edges between two looks at the clock
const BUDGET = 7; // milliseconds of drawing in one frame
const QUICK = 4000; // edges of the first picture, which appears at once

export class BaseLayer {
  private scene: Scene | null = null;
  private drawn: Camera | null = null;
  private camera: Camera = { k: 1, dx: 0, dy: 0 };
  private size: Size = { width: 1, height: 1 };
  private readonly spare: HTMLCanvasElement;
  private frame = 0;
  private rest = 0;
  /** Called when the picture is complete. */
  onComplete: () => void = () => undefined;

  constructor(private readonly canvas: HTMLCanvasElement) {
    this.spare = document.createElement("canvas");
  }

  setScene(scene: Scene, camera: Camera, size: Size): void {
    const first = this.scene?.model !== scene.model || this.scene.layout !== scene.layout;
    this.scene = scene;
    this.camera = camera;
    this.size = size;
    this.stop();
    if (first || this.drawn === null) this.drawQuick();
    this.drawSlowly();
  }

  /** Move the finished picture and draw it anew when the camera has rested. */
  move(camera: Camera): void {
    this.camera = camera;
    this.place();
    this.stop();
    this.rest = window.setTimeout(() => this.drawSlowly(), 140);
  }

  stop(): void {
    window.clearTimeout(this.rest);
    cancelAnimationFrame(this.frame);
  }

  private ratio(): number {
    return Math.min(2, window.devicePixelRatio || 1);
  }

  private resize(canvas: HTMLCanvasElement): CanvasRenderingContext2D {
    const scale = this.ratio() * (1 + 2 * MARGIN);
    const width = Math.round(this.size.width * scale);
    const height = Math.round(this.size.height * scale);
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    const context = canvas.getContext("2d")!;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    const ratio = this.ratio();
    const { k, dx, dy } = this.camera;
    context.setTransform(
      ratio * k,
      0,
      0,
      ratio * k,
      ratio * (dx + MARGIN * this.size.width),
      ratio * (dy + MARGIN * this.size.height),
    );
    return context;
  }

  private drawQuick(): void {
    const scene = this.scene!;
    const context = this.resize(this.canvas);
    paintGround(context, scene);
    paintEdges(context, scene, scene.edges, 0, Math.min(QUICK, scene.edges.length));
    paintNodes(context, scene, scene.visible.keys());
    this.drawn = this.camera;
    this.place();
  }

  private drawSlowly(): void {
    if (!this.scene) return;
    const scene = this.scene;
    const context = this.resize(this.spare);
    const camera = this.camera;
    paintGround(context, scene);
    let end = scene.edges.length;
    const step = (): void => {
      const started = performance.now();
      while (end > 0 && performance.now() - started < BUDGET) {
        const begin = Math.max(0, end - SLICE);
        paintEdges(context, scene, scene.edges, begin, end);
        end = begin;
      }
      if (end > 0) this.frame = requestAnimationFrame(step);
      else this.finish(context, scene, camera);
    };
    step();
  }

  private finish(context: CanvasRenderingContext2D, scene: Scene, camera: Camera): void {
    paintNodes(context, scene, scene.visible.keys());
    const { width, height } = this.spare;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    const shown = this.canvas.getContext("2d")!;
    shown.setTransform(1, 0, 0, 1, 0, 0);
    shown.clearRect(0, 0, width, height);
    shown.drawImage(this.spare, 0, 0);
    this.drawn = camera;
    this.place();
    this.onComplete();
  }

  /** Put the canvas where its picture belongs under the present camera. */
  private place(): void {
    if (!this.drawn) return;
    const { width, height } = this.size;
    const scale = this.camera.k / this.drawn.k;
    const left = this.camera.dx - (this.drawn.dx + MARGIN * width) * scale;
    const top = this.camera.dy - (this.drawn.dy + MARGIN * height) * scale;
    const style = this.canvas.style;
    style.width = `${(1 + 2 * MARGIN) * width}px`;
    style.height = `${(1 + 2 * MARGIN) * height}px`;
    style.transform = `translate(${left}px, ${top}px) scale(${scale})`;
  }
}
