// opens pages in a real browser and says what a reader would meet
// node look.mjs FOLDER-OF-NODE-MODULES page.html...
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [home, ...pages] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${home}/package.json`));
const load = async (name) => (await import(pathToFileURL(require.resolve(name)))).default;
const puppeteer = await load('puppeteer-core');
const chromium = await load('@sparticuz/chromium');

const browser = await puppeteer.launch({
  args: puppeteer.defaultArgs({ args: chromium.args, headless: 'shell' }),
  executablePath: await chromium.executablePath(),
  headless: 'shell',
});
const found = [];
for (const file of pages) {
  const page = await browser.newPage();
  const seen = { errors: [], requests: [], widths: {} };
  page.on('pageerror', (error) => seen.errors.push(String(error)));
  page.on('console', (message) => message.type() === 'error' && seen.errors.push(message.text()));
  page.on('request', (request) => seen.requests.push(request.url()));
  for (const width of [1200, 390]) {
    await page.setViewport({ width, height: 900 });
    await page.goto(pathToFileURL(file).href);
    await page.evaluate(() => document.querySelectorAll('details').forEach((each) => { each.open = true; }));
    seen.widths[width] = await page.evaluate(() => document.documentElement.scrollWidth);
  }
  seen.page = await page.evaluate(() => {
    const all = (query) => [...document.querySelectorAll(query)];
    const area = (each) => { const r = each.getBoundingClientRect(); return r.width * r.height; };
    return {
      headings: all('h2').filter(area).map((each) => each.textContent),
      dots: all('svg.trials circle').map((each) => [area(each) > 0, each.textContent]),
      cells: all('td.cell').map((each) => [each.textContent, getComputedStyle(each).backgroundColor]),
      outlined: all('td.got').map((each) => getComputedStyle(each).outlineStyle),
      buttons: all('button').filter(area).length,
    };
  });
  found.push(seen);
}
await browser.close();
console.log(JSON.stringify(found));
