// Runs the search's worker in a hidden frame when the site is opened from disk: browsers start no worker from file://.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = inside.document.createElement("script")
      script.src = address
      script.onload = () => this.waiting.splice(0).forEach(data => this.deliver(data))
      inside.document.body.append(script)
      this.loaded = false
      script.addEventListener("load", () => { this.loaded = true })
    }
    deliver(data) {
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
    }
    postMessage(data) {
      this.loaded ? this.deliver(data) : this.waiting.push(data)
    }
    terminate() {
      this.frame.remove()
    }
  }
}
