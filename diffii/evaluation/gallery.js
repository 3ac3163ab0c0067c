'use strict'

// What was made. `images` has for each image: name, label, suffix (numbers of `classes`
// and `suffixes`), parents (numbers of `real`), seed, attempt, strength, alpha, position,
// scores (in the order of `scores`) and src.
const data = JSON.parse(document.getElementById('data').textContent)
data.images.forEach((image, number) => { image.number = number })
const rejected = new Set() // of images
let parent = null // number of the real image whose children are shown
let page = 0
let shown = [] // images that pass the filters, in their order

const get = id => document.getElementById(id)

// ---- small tools

function element(kind, attributes = {}, ...children) {
  const node = document.createElement(kind)
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value)
  node.append(...children)
  return node
}

function options(select, pairs) {
  const made = pairs.map(([value, text]) => element('option', { value }, text))
  select.replaceChildren(...made)
}

function short(value) {
  if (value === null || value === undefined) return '-'
  return Number.isInteger(value) ? String(value) : value.toPrecision(3)
}

// decimals that show a hundredth of what lies between the extremes of a score
const decimals = data.scores.map((_, i) => {
  const values = data.images.map(image => image.scores[i]).filter(x => x !== null)
  let [low, high] = [Infinity, -Infinity]
  for (const x of values) [low, high] = [Math.min(low, x), Math.max(high, x)]
  const steps = high > low ? 2 - Math.floor(Math.log10(high - low)) : 3
  return Math.min(Math.max(steps, 0), 6)
})

function scoreText(value, i) {
  return value === null || value === undefined ? '-' : value.toFixed(decimals[i])
}

function picture(src, alt, name) {
  const attributes = { src, alt, loading: 'lazy', class: name }
  const image = element('img', attributes)
  if (data.sharp) image.classList.add('sharp')
  return image
}

// ---- what is rejected outlasts the page, where the browser allows it

const identity = image => `${image.name} ${image.attempt}`
const place = `diffii review ${data.key}`

function remember() {
  try {
    localStorage.setItem(place, JSON.stringify([...rejected].map(identity)))
  } catch { /* no storage: only the saved file lasts */ }
}

function recall() {
  try {
    const kept = new Set(JSON.parse(localStorage.getItem(place) || '[]'))
    for (const image of data.images) if (kept.has(identity(image))) rejected.add(image)
  } catch { /* as above */ }
}

// ---- filter and sort

function inRange(image) {
  const score = image.scores[get('score').value]
  const least = get('least').value
  const most = get('most').value
  if (least === '' && most === '') return true
  if (score === null || score === undefined) return false
  return (least === '' || score >= Number(least)) && (most === '' || score <= Number(most))
}

function passes(image) {
  const category = get('category').value
  const suffix = get('suffix').value
  const show = get('show').value
  return (category === '' || image.label === Number(category))
    && (suffix === '' || image.suffix === Number(suffix))
    && (show === 'all' || rejected.has(image) === (show === 'rejected'))
    && (parent === null || image.parents.includes(parent))
    && inRange(image)
}

function valueOf(image, order) {
  return order.startsWith('score ') ? image.scores[Number(order.slice(6))] : image[order]
}

function compare(a, b) {
  const order = get('order').value
  if (get('grouped').checked && a.label !== b.label) return a.label - b.label
  const [x, y] = [valueOf(a, order), valueOf(b, order)]
  const [noX, noY] = [x === null || x === undefined, y === null || y === undefined]
  if (noX !== noY) return noX - noY // without a value: last
  if (noX || x === y) return a.number - b.number
  const less = x < y ? -1 : 1
  return get('descending').checked ? -less : less
}

function refresh() {
  shown = data.images.filter(passes).sort(compare)
  page = 0
  draw()
}

// ---- one image

function point(angle, radius = 30) {
  // 0 is at the top, and angles grow clockwise
  return [50 + radius * Math.sin(angle), 50 - radius * Math.cos(angle)]
}

function drawn(kind, attributes) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', kind)
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value)
  return node
}

function dot(name, angle, r) {
  const [cx, cy] = point(angle)
  return drawn('circle', { class: name, cx, cy, r })
}

function numeral(text, angle) {
  const [x, y] = point(angle, 43)
  const node = drawn('text', { x, y })
  node.textContent = text
  return node
}

function circle(image) {
  const degrees = Math.round(image.position * 180 / Math.PI)
  const apart = Math.round(image.alpha * 180 / Math.PI)
  const label = `${degrees} degrees from parent 1; parent 2 is at ${apart} degrees`
  const svg = drawn('svg', { viewBox: '0 0 100 100', role: 'img', 'aria-label': label })
  const title = drawn('title', {})
  title.textContent = label
  const arc = `M ${point(0)} A 30 30 0 0 1 ${point(image.alpha)}`
  svg.append(
    title, drawn('circle', { cx: 50, cy: 50, r: 30 }), drawn('path', { d: arc }),
    dot('at-first', 0, 6), dot('at-second', image.alpha, 6),
    dot('at-made', image.position, 8),
    numeral('1', 0), numeral('2', image.alpha),
  )
  return svg
}

function parentButton(number, order) {
  const real = data.real[number]
  const text = `parent ${order + 1}: ${real.name}`
  const title = `${text}; click for all that was made from it`
  const look = real.src ? picture(real.src, text, '') : element('div', { class: 'absent' })
  const name = ['first', 'second'][order]
  const attributes = { class: name, title, tabindex: -1, 'data-parent': number }
  return element('button', attributes, look, element('b', {}, String(order + 1)))
}

function describe(image) {
  const words = [image.name.split('/').pop(), `seed ${image.seed}`]
  if (image.attempt) words.push(`attempt ${image.attempt}`)
  if (image.position !== null) {
    words.push(`at ${Math.round(image.position * 180 / Math.PI)}°`)
  }
  if (image.strength !== null) words.push(`strength ${short(image.strength)}`)
  return words.join(' · ')
}

function scoresOf(image) {
  if (image.scores.every(value => value === null)) return data.scores.length ? 'no score' : ''
  return data.scores.map((name, i) => `${name} ${scoreText(image.scores[i], i)}`).join(' · ')
}

function card(image) {
  const alt = `synthetic ${data.classes[image.label]}, ${image.name}`
  const from = element('div', { class: 'from' }, ...image.parents.map(parentButton))
  if (image.position !== null) from.append(circle(image))
  const looks = element('div', { class: 'looks' }, picture(image.src, alt, 'made'), from)
  const attributes = {
    class: 'card', tabindex: -1, role: 'button', 'data-number': image.number,
    'aria-label': alt, title: image.name,
  }
  const node = element('div', attributes, looks)
  const lines = [['facts', describe(image)], ['scores', scoresOf(image)]]
  if (image.suffix !== null) lines.unshift(['suffix', data.suffixes[image.suffix]])
  if (!get('grouped').checked) lines.unshift(['label', data.classes[image.label]])
  for (const [name, text] of lines) if (text) node.append(element('p', { class: name }, text))
  mark(node, image)
  return node
}

function mark(node, image) {
  node.classList.toggle('rejected', rejected.has(image))
  node.setAttribute('aria-pressed', rejected.has(image))
}

// ---- one page of images

function section(label, images) {
  const node = element('section')
  if (label !== null) {
    node.append(element('h2', {}, data.classes[label]))
    const real = data.real.filter(r => r.label === label && !r.view && r.src)
    const looks = real.slice(0, 20).map(r => picture(r.src, `real image ${r.name}`, ''))
    const words = real.length > 20 ? `real images, 20 of ${real.length}` : 'real images'
    const hint = element('span', { class: 'hint' }, words)
    if (real.length) node.append(element('div', { class: 'real' }, hint, ...looks))
  }
  node.append(element('div', { class: 'grid' }, ...images.map(card)))
  return node
}

function sections(images) {
  if (!get('grouped').checked) return images.length ? [section(null, images)] : []
  const labels = [...new Set(images.map(image => image.label))]
  return labels.map(k => section(k, images.filter(image => image.label === k)))
}

function draw() {
  const size = Number(get('size').value)
  const pages = Math.max(1, Math.ceil(shown.length / size))
  page = Math.min(Math.max(page, 0), pages - 1)
  const made = sections(shown.slice(page * size, (page + 1) * size))
  const empty = element('p', { class: 'empty' }, 'No image passes these filters.')
  get('images').replaceChildren(...(made.length ? made : [empty]))
  const first = document.querySelector('.card')
  if (first) first.tabIndex = 0
  get('page').textContent = `page ${page + 1} of ${pages}`
  get('previous').disabled = page === 0
  get('next').disabled = page === pages - 1
  const real = parent === null ? null : data.real[parent]
  get('parent').hidden = !real
  get('parent').textContent = real ? `made from ${real.name}` : ''
  count()
}

function turn(by) {
  page += by
  draw()
  get('images').scrollIntoView()
}

// ---- counts, and what gives bad images

function count() {
  const all = data.images.length
  const percent = all ? Math.round(100 * rejected.size / all) : 0
  get('counts').textContent =
    `${shown.length} of ${all} images pass the filters; ${rejected.size} rejected (${percent} %)`
  get('save').disabled = !rejected.size
  get('keep-all').disabled = !rejected.size
  if (get('summary').open) summarise()
}

function mean(values) {
  const found = values.filter(value => value !== null && value !== undefined)
  return found.length ? found.reduce((a, b) => a + b, 0) / found.length : null
}

// images by what `keys` says of them, worst first: {key, images, rejected, scores}
function groups(keys) {
  const found = new Map()
  for (const image of data.images) {
    for (const key of new Set(keys(image))) {
      if (!found.has(key)) found.set(key, [])
      found.get(key).push(image)
    }
  }
  const rows = [...found].map(([key, images]) => ({
    key,
    images: images.length,
    rejected: images.filter(image => rejected.has(image)).length,
    scores: data.scores.map((_, i) => mean(images.map(image => image.scores[i]))),
  }))
  return rows.sort(worse)
}

function worse(a, b) {
  const by = get('worst').value
  if (by !== '') {
    const [x, y] = [a.scores[Number(by)], b.scores[Number(by)]]
    return x === null || y === null ? (x === null) - (y === null) : x - y
  }
  return b.rejected / b.images - a.rejected / a.images || a.key - b.key
}

const MOST_LINES = 25

function table(id, title, rows, nameOf, extra = {}) {
  const heads = ['images', 'rejected', ...data.scores, ...Object.keys(extra)]
  const cells = heads.map(text => element('th', { class: 'number', scope: 'col' }, text))
  const head = element('tr', {}, element('th', { scope: 'col' }, title), ...cells)
  const lines = rows.slice(0, MOST_LINES).map(row => {
    const more = Object.values(extra).map(of => of(row.key))
    const counts = [row.images, row.rejected].map(short)
    const numbers = [...counts, ...row.scores.map(scoreText), ...more.map(short)]
    const tds = numbers.map(text => element('td', { class: 'number' }, text))
    const line = element('tr', { 'data-key': row.key, tabindex: 0 })
    line.append(element('td', {}, ...nameOf(row.key)), ...tds)
    return line
  })
  get(id).replaceChildren(element('thead', {}, head), element('tbody', {}, ...lines))
  if (rows.length > MOST_LINES) {
    const text = `the first ${MOST_LINES} of ${rows.length}`
    get(id).append(element('caption', { class: 'hint' }, text))
  }
}

function summarise() {
  const diversity = Object.entries(data.diversity).map(([kind, found]) => [
    `diversity, ${kind}`, key => found.each[data.classes[key]],
  ])
  const real = key => data.real.filter(r => r.label === key && !r.view).length
  const extra = { 'real images': real, ...Object.fromEntries(diversity) }
  const categories = groups(image => [image.label])
  table('by-category', 'category', categories, key => [data.classes[key]], extra)
  const suffixes = groups(image => image.suffix === null ? [] : [image.suffix])
  table('by-suffix', 'suffix', suffixes, key => [data.suffixes[key]])
  table('by-parent', 'parent', groups(image => image.parents), key => {
    const { src, name } = data.real[key]
    return [...(src ? [picture(src, '', '')] : []), ` ${name}`]
  })
}

// ---- reject, keep, save, load

function toggle(image) {
  if (rejected.has(image)) rejected.delete(image)
  else rejected.add(image)
  const node = document.querySelector(`[data-number="${image.number}"]`)
  if (node) mark(node, image)
  remember()
  count()
}

function names() {
  return data.images.filter(image => rejected.has(image)).map(image => image.name)
}

function save() {
  const text = names().map(name => `${name}\n`).join('')
  const url = URL.createObjectURL(new Blob([text], { type: 'text/plain' }))
  element('a', { href: url, download: 'rejected.txt' }).click()
  setTimeout(() => URL.revokeObjectURL(url), 60000)
}

async function load(file) {
  const wanted = new Set((await file.text()).split(/\r?\n/))
  for (const image of data.images) if (wanted.has(image.name)) rejected.add(image)
  remember()
  refresh()
}

// ---- clicks and keys

function everything() {
  for (const id of ['category', 'suffix', 'least', 'most']) get(id).value = ''
  get('show').value = 'all'
  parent = null
  refresh()
}

function only(id, key) {
  everything()
  if (id === 'by-parent') parent = key
  else get(id === 'by-suffix' ? 'suffix' : 'category').value = key
  refresh()
}

function clicked(event) {
  const real = event.target.closest('[data-parent]')
  const node = event.target.closest('.card')
  if (real) only('by-parent', Number(real.dataset.parent))
  else if (node) {
    focus(node)
    toggle(data.images[Number(node.dataset.number)])
  }
}

function focus(node) {
  for (const other of document.querySelectorAll('.card')) other.tabIndex = -1
  node.tabIndex = 0
  node.focus()
}

function move(node, key) {
  const cards = [...document.querySelectorAll('.card')]
  const here = node.getBoundingClientRect()
  let to = null
  if (key === 'ArrowLeft' || key === 'ArrowRight') {
    to = cards[cards.indexOf(node) + (key === 'ArrowRight' ? 1 : -1)]
  } else {
    // the nearest card of the line below or above
    const sign = key === 'ArrowDown' ? 1 : -1
    const below = c => sign * (c.getBoundingClientRect().top - here.top)
    const aside = c => Math.abs(c.getBoundingClientRect().left - here.left)
    const others = cards.filter(c => below(c) > here.height / 2)
    to = others.sort((a, b) => below(a) - below(b) || aside(a) - aside(b))[0]
  }
  if (to) focus(to)
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return
  const node = event.target.closest('.card')
  const line = event.target.closest('tr[data-key]')
  if (event.key === 'n' && !get('next').disabled) turn(1)
  else if (event.key === 'p' && !get('previous').disabled) turn(-1)
  else if (line && event.key === 'Enter') line.click()
  else if (node && ['x', 'Enter', ' '].includes(event.key)) {
    toggle(data.images[Number(node.dataset.number)])
  } else if (event.key.startsWith('Arrow') && node) move(node, event.key)
  else return
  event.preventDefault()
}

// ---- start

function choices() {
  const numbered = list => list.map((text, i) => [i, text])
  options(get('category'), [['', 'all'], ...numbered(data.classes)])
  options(get('suffix'), [['', 'all'], ...numbered(data.suffixes)])
  options(get('score'), numbered(data.scores))
  const orders = data.scores.map((name, i) => [`score ${i}`, `${name} score`])
  options(get('order'), [
    ['number', 'as made'], ...orders, ['position', 'position on the circle'],
    ['alpha', 'angle between the parents'], ['strength', 'strength'],
  ])
  const worst = data.scores.map((name, i) => [i, `lowest ${name}`])
  options(get('worst'), [['', 'share rejected'], ...worst])
  get('range').hidden = !data.scores.length
}

function listen() {
  for (const id of ['category', 'suffix', 'show', 'order', 'descending', 'grouped',
    'score', 'least', 'most', 'size']) get(id).addEventListener('change', refresh)
  get('reset').addEventListener('click', everything)
  get('previous').addEventListener('click', () => turn(-1))
  get('next').addEventListener('click', () => turn(1))
  get('save').addEventListener('click', save)
  get('load').addEventListener('change', event => load(event.target.files[0]))
  get('keep-all').addEventListener('click', () => {
    rejected.clear()
    remember()
    refresh()
  })
  get('large').addEventListener('change', event => {
    get('images').classList.toggle('large', event.target.checked)
  })
  get('worst').addEventListener('change', summarise)
  get('summary').addEventListener('toggle', count)
  for (const id of ['by-category', 'by-suffix', 'by-parent']) {
    get(id).addEventListener('click', event => {
      const line = event.target.closest('tr[data-key]')
      if (line) only(id, Number(line.dataset.key))
    })
  }
  get('images').addEventListener('click', clicked)
  document.addEventListener('keydown', pressed)
}

choices()
recall()
listen()
refresh()
