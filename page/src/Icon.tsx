/** Small line pictures for buttons. */

const PATHS = {
  undo: "M9 7H4V2 M4 7a8 8 0 1 1-1.2 6",
  redo: "M11 7h5V2 M16 7a8 8 0 1 0 1.2 6",
  link: "M8 12l4-4 M7 9l-2.5 2.5a3 3 0 0 0 4.2 4.2L11 13 M13 11l2.5-2.5a3 3 0 0 0-4.2-4.2L9 7",
  download: "M10 3v9 M6 9l4 4 4-4 M4 17h12",
  search: "M9 15a6 6 0 1 1 0-12 6 6 0 0 1 0 12z M13.5 13.5L17 17",
  theme: "M10 3a7 7 0 1 0 0 14z M10 3a7 7 0 0 1 0 14",
  help: "M7.5 7.5a2.5 2.5 0 1 1 3.6 2.3c-.8.4-1.1 1-1.1 1.9 M10 14.6v.4",
  pin: "M7 3h6l-1 5 3 3H5l3-3z M10 11v6",
  fit: "M3 7V3h4 M13 3h4v4 M17 13v4h-4 M7 17H3v-4",
  plus: "M10 4v12 M4 10h12",
  minus: "M4 10h12",
  close: "M5 5l10 10 M15 5L5 15",
  list: "M4 5h12 M4 10h12 M4 15h12",
  group: "M3 3h6v6H3z M11 11h6v6h-6z M9 6h5v5",
  ungroup: "M3 3h5v5H3z M12 12h5v5h-5z",
  expand: "M6 8l4 4 4-4",
  wand: "M4 16L13 7 M14 2v4 M12 4h4 M16 9v3 M14.5 10.5h3",
} as const;

export type IconName = keyof typeof PATHS;

export function Icon({ name }: { name: IconName }) {
  return (
    <svg class="icon" viewBox="0 0 20 20" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}
