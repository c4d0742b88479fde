// Looks at a report in headless Chromium: no request leaves the page, nothing overflows a screen, axe finds nothing to
// mend; light and dark, desktop and 400 px. Writes the screenshots into a folder; docs/report.md shows two.
// Usage: node docs/check_report.mjs report.html FOLDER (after: npm install --no-save playwright-core axe-core)
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { chromium } from 'playwright-core';

const [report, folder] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
const executablePath = process.env.CHROMIUM ?? execFileSync('which', ['chromium'], { encoding: 'utf8' }).trim();
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox'] });
let faults = 0;

function check(name, found) {
  for (const line of found) console.error(`${name}: ${line}`);
  faults += found.length;
}

for (const [screen, width] of [['desktop', 1000], ['narrow', 400]]) {
  for (const colorScheme of ['light', 'dark']) {
    const name = `${screen}-${colorScheme}`;
    const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme, bypassCSP: true });
    const page = await context.newPage();
    const requests = [];
    page.on('request', (r) => { if (!/^(data|file):/.test(r.url())) requests.push(`asks for ${r.url()}`); });
    page.on('console', (message) => check(name, [message.text()]));
    await page.goto(pathToFileURL(path.resolve(report)).href);
    await page.screenshot({ path: path.join(folder, `report-${name}.png`), fullPage: true });
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    await page.evaluate(() => document.querySelectorAll('details').forEach((d) => { d.open = true; }));
    await page.evaluate(axe);
    const { passes, violations } = await page.evaluate(() => window.axe.run());
    check(name, requests);
    check(name, wide > 0 ? [`is ${wide} px wider than the screen`] : []);
    check(name, violations.map((v) => `${v.id}: ${v.help} (${v.nodes.length} times, first ${v.nodes[0].html})`));
    console.log(`${name}: ${passes.length} rules of axe hold, ${violations.length} do not; ${requests.length} requests`);
    await context.close();
  }
}
await browser.close();
process.exit(faults ? 1 : 0);
