// node open.mjs URL MODULES BROWSER: opens the page and prints what it drew as JSON, with what
// it shows of a feature where the URL has a node (clickedId). What the page takes from other
// hosts comes from MODULES; its d3-jetpack is an older one, with `nest` and `drawAxis` on conventions.
import { readFileSync } from "node:fs"
import { createRequire } from "node:module"
import { resolve } from "node:path"

const [url, modules, executablePath] = process.argv.slice(2)
const { chromium } = createRequire(resolve(modules) + "/")("playwright-core")
const text = (path) => readFileSync(`${modules}/${path}`, "utf8")
const asModule = (body, require) =>
  `((require) => { const module = { exports: {} }, exports = module.exports;${body};return module.exports })(${require})`

const jetpack = () => `{
  const old = ${asModule(text("d3-collection/dist/d3-collection.js"), "null")}
  const added = ${asModule(text("d3-jetpack/build/d3-jetpack.cjs"), 'name => name === "d3-collection" ? old : d3')}
  for (const name in added) d3[name] = added[name]
  d3.conventions = (given) => {
    const c = added.conventions(given)
    c.drawAxis ??= () => d3.drawAxis(c)
    return c
  }
}`
const scripts = {
  "d3.js": () => text("d3/dist/d3.js"),
  "jetpack_2024-07-20.js": jetpack,
  "dagre.min.js": () => text("dagre/dist/dagre.min.js"),
  "pako.min.js": () => text("pako/dist/pako.min.js"),
}

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] })
const page = await browser.newPage()
const errors = []
page.on("pageerror", (error) => errors.push(String(error)))
await page.route(/^https?:\/\/(?!127\.0\.0\.1)/, (route) => {
  const name = new URL(route.request().url()).pathname.split("/").pop()
  const body = (scripts[name] ?? (() => ""))()
  return route.fulfill({ status: 200, contentType: "application/javascript", body })
})
await page.goto(url)
try {
  await page.waitForFunction(() => document.querySelectorAll(".link-graph text.node").length > 0)
  if (new URL(url).searchParams.has("clickedId"))
    await page.waitForFunction(() => document.querySelectorAll(".feature-examples .ctx-container").length > 0)
} catch (error) {
  errors.push(String(error))
}
const drawn = await page.evaluate(() => ({
  title: document.title,
  nodes: d3.selectAll(".link-graph text.node").data().map((d) => d.node_id),
  feature: document.querySelector(".feature-detail .feature-title")?.textContent,
  groups: [...document.querySelectorAll(".example-2-col > div")].map((group) => ({
    name: group.querySelector(".quantile-title").textContent.trim(),
    examples: [...group.querySelectorAll(".ctx-container")].map((example) => ({
      text: example.textContent,
      token: example.querySelector(".train_token_ind")?.textContent,
      faint: getComputedStyle(example.firstChild).opacity < 1,
    })),
  })),
  tokens: [...document.querySelectorAll(".feature-example-logits .ctx-container")].map((row) =>
    [...row.querySelectorAll(".token")].map((token) => token.textContent)
  ),
  links: d3.selectAll(".link-graph text.node").data().reduce((sum, d) => sum + d.sourceLinks.length, 0),
}))
console.log(JSON.stringify({ ...drawn, errors }))
await browser.close()
