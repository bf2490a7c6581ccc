import { expect, it } from "vitest";
import { NEW_ADDRESS, readAddress, writeAddress, type Address } from "../src/url";

it("reads back every address that it writes", () => {
  const address: Address = {
    graph: "a b&c.safetensors",
    node: 0.55,
    edge: 0.9,
    selected: "3/7/412",
    tab: "compare",
    filter: { errors: false, tokens: true, positive: true, negative: false, density: 0.2 },
    pathFrom: "token/4",
    pathTo: "target/0",
    other: "other.json",
    align: "feature",
    camera: [1.25, -30, 12],
    edits: '{"pins":["0/1/2"]}',
  };
  expect(readAddress(`#${writeAddress(address)}`)).toEqual(address);
  expect(writeAddress(NEW_ADDRESS)).toBe("");
  expect(readAddress("")).toEqual(NEW_ADDRESS);
});

it("ignores what is not an address", () => {
  expect(readAddress("#n=7&e=x&tab=evil&at=0,NaN")).toEqual(NEW_ADDRESS);
});
