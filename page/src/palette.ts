/** Colours of the canvas, read from the style sheet, so that themes are written once. */

export interface Palette {
  ground: string;
  panel: string;
  band: string;
  ink: string;
  muted: string;
  faint: string;
  positive: string;
  negative: string;
  feature: string;
  error: string;
  token: string;
  target: string;
  accent: string;
  pin: string;
  font: string;
}

const NAMES: Record<keyof Palette, string> = {
  ground: "--ground",
  panel: "--panel",
  band: "--band",
  ink: "--ink",
  muted: "--muted",
  faint: "--line",
  positive: "--positive",
  negative: "--negative",
  feature: "--feature",
  error: "--error",
  token: "--token",
  target: "--target",
  accent: "--accent",
  pin: "--pin",
  font: "--font",
};

export function readPalette(element: Element): Palette {
  const style = getComputedStyle(element);
  const palette = { ...NAMES };
  for (const key of Object.keys(NAMES) as (keyof Palette)[]) palette[key] = style.getPropertyValue(NAMES[key]).trim();
  return palette;
}

/** Colours of groups, apart from each other for colour-blind eyes too (Okabe and Ito). */
export const GROUP_COLOURS = ["#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#0072B2", "#B8A800"] as const;

export function groupColour(index: number): string {
  return GROUP_COLOURS[index % GROUP_COLOURS.length] ?? GROUP_COLOURS[0];
}

/** Mix two #rrggbb or #rgb colours; share: of the second. */
export function mix(first: string, second: string, share: number): string {
  const channel = (colour: string, i: number): number =>
    colour.length === 4 ? 17 * parseInt(colour[1 + i]!, 16) : parseInt(colour.slice(1 + 2 * i, 3 + 2 * i), 16);
  const parts = [0, 1, 2].map((i) => Math.round(channel(first, i) * (1 - share) + channel(second, i) * share));
  return `#${parts.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
}
