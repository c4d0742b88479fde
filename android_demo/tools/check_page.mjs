// Uses the app's page as a person would, in headless Chromium with the real engine behind it: at 360 and 412 px, light
// and dark. Streaming, a stage moved while an answer runs, stop, settings, mistakes; axe finds nothing to mend.
// Usage: node android_demo/tools/check_page.mjs PYTHON BUNDLE FOLDER (screenshots go there)
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { chromium } from 'playwright-core';

const [python, bundle, folder] = process.argv.slice(2);
const tools = path.dirname(new URL(import.meta.url).pathname);
const axe = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
const executablePath = process.env.CHROMIUM ?? execFileSync('which', ['chromium'], { encoding: 'utf8' }).trim();
const server = spawn(python, [path.join(tools, 'preview.py'), bundle, '--port', '0'], { stdio: ['ignore', 'pipe', 'inherit'] });
const address = await new Promise((resolve, reject) => {
  server.stdout.once('data', (data) => resolve(String(data).trim()));
  server.once('exit', () => reject(new Error('the preview did not start')));
});
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox'] });
try {
  for (const width of [360, 412]) {
    for (const colorScheme of ['light', 'dark']) {
      await use(width, colorScheme);
      console.log(`${width} px, ${colorScheme}: holds`);
    }
  }
} finally {
  await browser.close();
  server.kill('SIGINT');
}

async function use(width, colorScheme) {
  const context = await browser.newContext({ viewport: { width, height: 780 }, colorScheme, bypassCSP: true });
  const page = await context.newPage();
  const faults = [];
  page.on('console', (message) => { if (message.type() === 'error') faults.push(message.text()); });
  page.on('pageerror', (error) => faults.push(String(error)));
  page.on('request', (request) => { if (!request.url().startsWith(address)) faults.push(`asks for ${request.url()}`); });
  await page.goto(address);
  await page.waitForSelector('#send:not([disabled])', { timeout: 60_000 });
  const stages = await page.locator('.stage input').count();

  await page.click('#settings summary');
  await page.fill('#max_tokens', '24');
  await page.click('#settings summary');
  await page.fill('#text', 'Why do leaves change color in autumn?');
  await page.press('#text', 'Enter');
  await page.waitForSelector('.foot', { timeout: 60_000 });
  assert.match(await page.locator('.foot').first().textContent(), /^(24|\d+) tokens, [\d.]+ a second/);
  assert.ok((await page.locator('.answer').first().textContent()).length > 20, 'an answer of some words');
  assert.ok(await page.isChecked('#dial input[value=""]'), 'a new page follows the schedule');
  assert.equal(await page.locator('.answer >> nth=0 >> .stage-2').count(), 0, 'whatever the page before it chose');

  await page.click('#settings summary');
  await page.fill('#max_tokens', '400');
  await page.click('#settings summary');
  await page.fill('#text', 'Tell me a long story about a lighthouse.');
  await page.click('#send');
  await page.waitForSelector('.answer:nth-of-type(5) span, .answer >> nth=1 >> span', { timeout: 60_000 });
  if (stages > 1) { // the rank is moved while the answer runs
    await page.locator('.stage input').last().check();
    await page.waitForSelector(`.answer >> nth=1 >> .stage-${(stages - 1) % 4}`, { timeout: 60_000 });
  }
  assert.ok(await page.isVisible('#halt'), 'an answer that runs can be stopped');
  await page.screenshot({ path: path.join(folder, `android-${width}-${colorScheme}.png`) });
  await page.click('#halt');
  await page.waitForFunction(() => document.querySelectorAll('.foot').length === 2, undefined, { timeout: 60_000 });
  assert.match(await page.locator('.foot').last().textContent(), /stopped/);

  await page.click('#settings summary');
  await page.fill('#temperature', '1000');
  await page.fill('#text', 'Why?');
  await page.click('#send');
  await page.waitForSelector('.error');
  assert.match(await page.locator('.error').textContent(), /temperature 1000(\.0)? is not from 0 to 100/);
  await page.fill('#temperature', '0.7');
  await page.click('#again');
  await page.waitForFunction(() => document.getElementById('talk').children.length === 0);

  // Another bundle of the shelf: a mistake, then this one, opened and measured by stage.
  await page.fill('#temperature', '0');
  await page.click('#settings summary');
  await page.click('#shelf summary');
  await page.fill('#folder', '/nowhere');
  await page.click('#import');
  await page.waitForFunction(() => /flrc.json is missing/.test(document.getElementById('shelf_note').textContent));
  await page.fill('#folder', bundle);
  await page.click('#import');
  await page.waitForFunction(() => /is imported/.test(document.getElementById('shelf_note').textContent), undefined, { timeout: 60_000 });
  await page.screenshot({ path: path.join(folder, `android-shelf-${width}-${colorScheme}.png`) });
  await page.click('#settings summary');
  await page.selectOption('#accuracy_level', '0');
  await page.click('#settings summary');
  await page.locator('#bundles button', { hasText: 'Open' }).last().click();
  await page.waitForFunction(() => !document.getElementById('shelf').open, undefined, { timeout: 60_000 });
  await page.waitForSelector('#measure:not([disabled])', { state: 'attached' });
  await page.click('#bench summary');
  await page.click('#measure');
  await page.waitForFunction((n) => document.querySelectorAll('#results tbody tr').length === n, stages, { timeout: 120_000 });
  for (const rate of await page.locator('#results tbody td:last-child').allTextContents()) {
    assert.ok(Number(rate) > 0, `a stage was measured at ${rate} tokens a second`);
  }
  await page.screenshot({ path: path.join(folder, `android-benchmark-${width}-${colorScheme}.png`) });
  await page.click('#bench summary');

  // The automatic rank: at most no time at all a token ends on the last stage.
  await page.click('#settings summary');
  await page.selectOption('#policy', 'ms');
  await page.fill('#budget_value', '0.01');
  await page.press('#budget_value', 'Tab');
  await page.fill('#max_tokens', '24');
  await page.click('#settings summary');
  await page.fill('#text', 'Why is the sky blue?');
  await page.click('#send');
  await page.waitForSelector('.foot >> nth=-1', { timeout: 60_000 });
  await page.waitForSelector('#send:not([hidden])', { timeout: 60_000 });
  if (stages > 1) {
    assert.ok(await page.locator(`.answer .stage-${(stages - 1) % 4}`).count() > 0, 'a short budget leaves stage 0');
  }

  await page.reload();
  await page.waitForSelector('#send:not([disabled])', { timeout: 60_000 });
  assert.equal(await page.inputValue('#budget_value'), '0.01', 'settings outlive the page');
  assert.equal(await page.inputValue('#accuracy_level'), '0');

  const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  assert.ok(wide <= 0, `the page is ${wide} px wider than the screen`);
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run());
  assert.deepEqual(violations.map((v) => `${v.id}: ${v.nodes[0].html}`), []);
  assert.deepEqual(faults, []);
  await context.close();
}
